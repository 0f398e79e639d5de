"""Weights that another library quantized: what mlx-lm reads of them, the rest refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.tensor_files import StoredTensor

_PER_WORD = 8  # codes of four bits
_AWQ_GROUP_SIZES = (32, 64, 128)
_READ_BY_MLX_LM = ("mxfp4", "mxfp8", "compressed-tensors", "modelopt")


def check_foreign_quantization(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what to add to config.json's content so that mlx-lm reads the weights.

    Args:
        content: of config.json.
        path: the checkpoint directory, for messages.

    Raises:
        CheckpointError: mlx-lm does not read this method, which is named.
    """
    settings = content.get("quantization_config")
    if "quantization" in content or not settings:
        return {}
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}/config.json: quantization_config is not a table")
    method = settings.get("quant_method")
    if method is None and "bits" in settings and "group_size" in settings:
        return {"quantization": settings}  # mlx-lm's own, under the other name only
    if method is None and any(key.startswith("load_in_") for key in settings):
        method = "bitsandbytes"
    if not _is_read(method, settings):
        details = ", ".join(
            f"{key} {settings[key]}"
            for key in ("bits", "version", "group_size", "format", "fmt")
            if settings.get(key) is not None
        )
        raise CheckpointError(
            f"{path}: its weights are quantized by {method or 'a method without a name'}"
            f"{f' ({details})' if details else ''}, which cannot be read here; get the model's "
            "original weights, or a version made for MLX"
        )
    return {}


def check_awq_layers(
    model: nn.Module, tensors: Mapping[str, StoredTensor], content: Mapping[str, Any]
) -> None:
    """Check weights in AWQ's layout against the layers that they are for; mlx trusts them.

    Args:
        model: just built, its layers not yet quantized.
        tensors: of the checkpoint, by parameter name.
        content: of config.json.

    Raises:
        ValueError: names the first layer that does not fit.
    """
    for path, module in model.named_modules():
        codes = tensors.get(f"{path}.qweight")
        if codes is None or not hasattr(module, "to_quantized"):
            continue
        group_size = content["quantization_config"].get("group_size", 128)
        rows, columns = module.weight.shape
        found = [
            tensor.shape if (tensor := tensors.get(f"{path}.{name}")) is not None else None
            for name in ("qweight", "scales", "qzeros")
        ]
        wanted = [
            (columns, rows // _PER_WORD),
            (columns // group_size, rows),
            (columns // group_size, rows // _PER_WORD),
        ]
        if found != wanted or columns % group_size or rows % _PER_WORD or codes.dtype != "I32":
            raise ValueError(
                f"{path} has {rows} rows and {columns} columns, which its AWQ weights in groups of "
                f"{group_size} do not have"
            )


def _is_read(method: object, settings: Mapping[str, Any]) -> bool:
    if method == "awq":
        version = str(settings.get("version") or "gemm").lower()
        return (
            settings.get("bits", 4) == 4
            and version == "gemm"
            and settings.get("group_size", 128) in _AWQ_GROUP_SIZES
        )
    if method == "fp8":
        blocks = settings.get("weight_block_size")
        return settings.get("scale_fmt") == "ue8m0" and blocks == [32, 32]
    return method in _READ_BY_MLX_LM
