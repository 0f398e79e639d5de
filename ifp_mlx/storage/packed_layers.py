"""Packed weights that fit their layers: checked before mlx computes with their shapes.

mlx divides by group sizes and counts of scales; a checkpoint in which these do not fit ends the
process there instead of raising.
"""

from typing import Any

import mlx.nn as nn

from ifp_mlx.storage.tensor_files import StoredTensor

_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUP_SIZES = (32, 64, 128)
# (bits, group size) of the other modes; their scales are bytes.
_FIXED = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def check_quantization(settings: Any) -> None:
    """Check what config.json says under ``quantization``, for all layers and for single ones.

    Raises:
        ValueError: it is not a form of quantization that mlx has.
    """
    if not isinstance(settings, dict):
        raise ValueError("quantization is not a table")
    _check_form(settings)
    for path, own in settings.items():
        if isinstance(own, dict):
            _check_form({"mode": settings.get("mode", "affine"), **own}, f" of {path}")


def check_packed_layers(model: nn.Module, tensors: dict[str, StoredTensor]) -> None:
    """Check the packed weights of a checkpoint against the layers that they are for.

    Args:
        model: just built, its layers not yet quantized.
        tensors: of the checkpoint, by parameter name.

    Raises:
        ValueError: names the first layer that does not fit.
    """
    for path, module in model.named_modules():
        scales, weight = tensors.get(f"{path}.scales"), tensors.get(f"{path}.weight")
        if scales is None or not hasattr(module, "to_quantized"):
            continue
        if f"{path}.qweight" in tensors:
            continue  # another library's layout
        *rows, columns = module.weight.shape  # of a matrix, or of a stack of them
        if weight is None or weight.dtype != "U32" or len(weight.shape) != len(rows) + 1:
            raise ValueError(f"{path} has scales but no packed weight")
        if not list(weight.shape[:-1]) == list(scales.shape[:-1]) == rows:
            raise ValueError(
                f"{path} has {' x '.join(map(str, rows))} rows, its packed weight {weight.shape} "
                f"and scales {scales.shape} do not"
            )
        num_groups, words = scales.shape[-1], weight.shape[-1]
        if not num_groups or columns % num_groups or words * 32 % columns:
            raise ValueError(
                f"{path} has {columns} columns, which its packed weight {weight.shape} and scales "
                f"{scales.shape} do not divide"
            )
        form = (words * 32 // columns, columns // num_groups)
        packed_bytes = scales.dtype == "U8"
        if packed_bytes and form not in _FIXED.values():
            raise ValueError(f"{path} has {form[0]} bits in groups of {form[1]}, no format of mlx")
        if not packed_bytes and not _is_affine(*form):
            raise ValueError(f"{path} has {form[0]} bits in groups of {form[1]}, no format of mlx")


def _is_affine(bits: Any, group_size: Any) -> bool:
    return bits in _AFFINE_BITS and group_size in _AFFINE_GROUP_SIZES


def _check_form(settings: dict[str, Any], where: str = "") -> None:
    bits, group_size = settings.get("bits"), settings.get("group_size")
    mode = settings.get("mode", "affine")
    if not isinstance(bits, int) or not isinstance(group_size, int) or not isinstance(mode, str):
        raise ValueError(f"quantization{where} lacks bits or group_size")
    fits = (
        _is_affine(bits, group_size)
        if mode == "affine"
        else (_FIXED.get(mode) == (bits, group_size))
    )
    if not fits:
        raise ValueError(
            f"quantization{where} is {mode} with {bits} bits in groups of {group_size}, "
            "which mlx does not have"
        )
