"""The weights of checkpoint directories: where each tensor is, and the model that they make.

A checkpoint is what mlx-lm and transformers call one: ``config.json``, ``model*.safetensors``,
tokenizer files. Everything is validated before mlx-lm reads it; what does not fit is one clear
``CheckpointError``. Nothing is unpickled, no code of the checkpoint is run.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.config_file import check_links, read_config, read_json
from ifp_mlx.storage.packed_layers import check_packed_layers, check_quantization
from ifp_mlx.storage.tensor_files import StoredTensor, read_header
from ifp_mlx.storage.transformers_import import finish_importing_transformers
from ifp_mlx.units.kinds import UnitShape
from ifp_mlx.units.model_config import ModelConfig
from ifp_mlx.units.modules import unit_shape

_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a checkpoint directory is, from checked headers.

    Raises:
        CheckpointError: there are no weights, only pickled ones, or a file is damaged.
    """
    check_links(path)
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        pickled = [p.name for ending in ("*.bin", "*.pt", "*.pth") for p in path.glob(ending)]
        if pickled:
            raise CheckpointError(
                f"{path} has only pickled weights ({pickled[0]}), which can run code when read; "
                "get the safetensors version of this model"
            )
        raise CheckpointError(f"{path} has no model*.safetensors; convert or download it again")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is in {tensors[name].path.name} and in {file.name}"
                )
            tensors[name] = tensor
    _check_index(path, tensors)
    return tensors


def load_model(
    path: Path, dtype: mx.Dtype | Literal["auto"] | None = None, *, lazy: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Return an mlx-lm model and its configuration. Evaluates, unless ``lazy``.

    Args:
        path: a checkpoint directory.
        dtype: None keeps the weights as they are stored. A floating type dequantizes packed
            weights and casts. "auto" is float32 on the CPU, where it is the only fast type, as
            long as that takes at most half of the memory; on a GPU it keeps them as stored.
        lazy: leave the weights on disk until they are used; they are then not checked for NaN.

    Returns:
        The model in evaluation mode, and config.json with ``quantization`` as it now is.

    Raises:
        CheckpointError: damaged or missing weights, weights that disagree with config.json, or
            weights that are not finite.
        ConfigError: config.json lacks what the family needs.
        ArchitectureError: the family is not in the FFN table.
    """
    # Here because mlx-lm brings transformers, which take more than a second.
    finish_importing_transformers()
    from mlx_lm.utils import _get_classes, dequantize_model
    from mlx_lm.utils import load_model as load_mlx_model

    def checked_classes(config: dict[str, Any]) -> tuple[Callable[[Any], nn.Module], type]:
        model_class, arguments_class = _get_classes(config)

        def build(arguments: Any) -> nn.Module:
            model: nn.Module = model_class(arguments)
            check_packed_layers(model, tensors)
            return model

        return build, arguments_class

    config = read_config(path)
    settings = config.content
    tensors = stored_tensors(path)
    _check_layer_count(path, config, tensors)
    try:
        if "quantization" in settings:
            check_quantization(settings["quantization"])
        rope = {key: settings[key] for key in _ROPE_KEYS if key in settings}
        model, content = load_mlx_model(
            path, lazy=True, model_config=rope, get_model_classes=cast(Any, checked_classes)
        )
    except Exception as error:  # mlx-lm reports a bad checkpoint with whatever comes first
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: config.json and the weights disagree ({reason}); convert the model again"
        ) from error
    if dtype == "auto":
        dtype = automatic_dtype(model)
    if dtype is not None:
        model = dequantize_model(model)
        content = {k: v for k, v in content.items() if not k.startswith("quantization")}
        model.set_dtype(dtype)
    if not lazy:
        require_finite(path)
        mx.eval(model.parameters())
    return model, content


def stored_unit_shape(path: Path) -> UnitShape:
    """Return how many units a checkpoint has, counted in its headers; loads no weights.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    family = read_config(path).family
    tensors = stored_tensors(path)
    first = family.kind.parts[0]
    found = {
        layer: tensor
        for layer in sorted(_layer_numbers(tensors))
        if (tensor := tensors.get(family.array_name(layer, first, "weight"))) is not None
    }
    if found:
        rows = next(iter(found.values())).shape[0]
        return UnitShape(tuple(found), rows // first.stacked)
    return unit_shape(load_model(path, lazy=True)[0])  # stored as another library has it


def require_finite(path: Path) -> None:
    """Refuse a checkpoint with values that are not numbers. Evaluates, one tensor at a time.

    Looks at the tensors as they are stored: of packed weights only scales and biases are
    floating, which is a tenth of what they become.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, or a file is damaged.
    """
    for file in sorted({tensor.path for tensor in stored_tensors(path).values()}):
        arrays = cast(dict[str, mx.array], mx.load(str(file)))
        while arrays:
            name, array = arrays.popitem()
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
                raise CheckpointError(
                    f"{path}: {name} holds values that are not numbers (NaN or infinity); "
                    "download or convert the model again"
                )


def _check_index(path: Path, tensors: dict[str, StoredTensor]) -> None:
    index_path = path / "model.safetensors.index.json"
    if not index_path.exists():
        return
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index_path} has no weight_map; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
            raise CheckpointError(f"{index_path} names a file outside the checkpoint: {file!r}")
        if not (path / file).exists():
            raise CheckpointError(f"{path} lacks {file}; download the model again")
        if name not in tensors or tensors[name].path.name != file:
            raise CheckpointError(f"{index_path}: tensor {name!r} is not in {file}")


def _check_layer_count(path: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> None:
    numbers = _layer_numbers(tensors)
    expected = config.num_hidden_layers
    if numbers != set(range(min(expected, len(numbers) + 1))):
        raise CheckpointError(
            f"{path}: config.json says {expected} layers, the weights have {len(numbers)}"
        )


def _layer_numbers(tensors: dict[str, StoredTensor]) -> set[int]:
    return {int(match[1]) for name in tensors if (match := _LAYER_NUMBER.search(name))}


def automatic_dtype(model: nn.Module) -> mx.Dtype | None:
    """Return the type that "auto" computes a model in: see ``load_model``. Evaluates nothing."""
    from mlx_lm.utils import get_total_parameters

    if mx.default_device() != mx.cpu:
        return None
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = int(get_total_parameters(model)) * 4 <= memory_bytes // 2
    return mx.float32 if fits else None
