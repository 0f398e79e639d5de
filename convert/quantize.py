"""Quantized checkpoints: fewer bits a weight, in the formats that MLX computes with."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ifp_mlx.convert.checkpoint_writer import copy_tokenizer_files, write_model
from ifp_mlx.convert.progress import Progress, no_progress
from ifp_mlx.errors import CheckpointError, UsageError
from ifp_mlx.storage.files import require_free_disk, staged_directory
from ifp_mlx.storage.origin import read_origin, write_origin
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model, stored_tensors

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
# Modes of the microscaling standard and of NVIDIA: one (bits, group size) each.
_FIXED_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
MODES = ("affine", *_FIXED_MODES)
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
"""mlx-lm's mixes of two bit widths; the wider one goes where it matters more."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How to quantize. Use ``make_quantization``, which checks it.

    Attributes:
        bits: of each weight.
        group_size: weights that share a scale.
        mode: one of ``MODES``.
        recipe: one of ``RECIPES``, which chooses the bits of each layer itself.
    """

    bits: int
    group_size: int
    mode: str
    recipe: str | None

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings as config.json has them."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def make_quantization(
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    recipe: str | None = None,
) -> Quantization:
    """Return a quantization that MLX has; what is None is what the mode has, or 4 bits by 64.

    Raises:
        UsageError: MLX has no such combination.
    """
    if mode not in MODES:
        raise UsageError(f"there is no mode {mode!r}; there are: {', '.join(MODES)}")
    if recipe is not None and recipe not in RECIPES:
        raise UsageError(f"there is no recipe {recipe!r}; there are: {', '.join(RECIPES)}")
    if recipe is not None and (mode != "affine" or bits is not None):
        raise UsageError("a recipe chooses the bits itself, in mode affine; give it alone")
    default = _FIXED_MODES.get(mode, (4, 64))
    made = Quantization(bits or default[0], group_size or default[1], mode, recipe)
    if mode in _FIXED_MODES and (made.bits, made.group_size) != default:
        raise UsageError(f"mode {mode} always has {default[0]} bits in groups of {default[1]}")
    if mode == "affine" and made.bits not in AFFINE_BITS:
        raise UsageError(f"`bits` must be one of {', '.join(map(str, AFFINE_BITS))}")
    if mode == "affine" and made.group_size not in AFFINE_GROUP_SIZES:
        raise UsageError(f"`group_size` must be one of {', '.join(map(str, AFFINE_GROUP_SIZES))}")
    return made


@dataclasses.dataclass(frozen=True)
class QuantizedCheckpoint:
    """What ``quantize_checkpoint`` made.

    Attributes:
        bytes_before: of the source's weights on disk.
        bytes_after: of the weights written.
        bits_per_weight: everything that is stored, over the number of weights.
        num_plain: matrices that stayed as they were: their width is no multiple of the group.
    """

    path: Path
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    num_plain: int


def quantize_checkpoint(
    source: Path,
    target: Path,
    quantization: Quantization,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> QuantizedCheckpoint:
    """Write a quantized copy of a checkpoint directory, whole or not at all.

    A source that is quantized itself is dequantized first. Weights pass through memory one
    matrix at a time.

    Raises:
        CheckpointError: the source is damaged.
        ResourceError: not enough disk.
        UsageError: the target exists.
    """
    bytes_before = sum(tensor.num_bytes for tensor in stored_tensors(source).values())
    with staged_directory(target, overwrite=overwrite) as staging:
        num_weights, num_plain = write_quantized(source, staging, quantization, progress=progress)
        write_origin(staging, read_origin(source))
        load_model(staging, lazy=True)
        load_tokenizer(staging)
        bytes_after = sum(tensor.num_bytes for tensor in stored_tensors(staging).values())
    return QuantizedCheckpoint(
        target, bytes_before, bytes_after, bytes_after * 8 / num_weights, num_plain
    )


def write_quantized(
    source: Path,
    target: Path,
    quantization: Quantization,
    *,
    dtype: mx.Dtype | None = None,
    progress: Progress = no_progress,
) -> tuple[int, int]:
    """Write weights, config and tokenizer of a checkpoint, quantized, into an existing directory.

    Args:
        source: a checkpoint directory.
        target: an existing directory.
        quantization: how.
        dtype: of what is not packed, scales among it; None keeps the source's.
        progress: called while writing.

    Returns:
        The number of weights, and how many matrices had to stay plain.

    Raises:
        CheckpointError: the source is damaged.
        ResourceError: not enough disk.
    """
    from mlx_lm.utils import dequantize_model, get_total_parameters

    model, config = load_model(source, lazy=True)
    model = dequantize_model(model)
    if dtype is not None:
        model.set_dtype(dtype)
    num_weights = int(get_total_parameters(model))
    total = _expected_bytes(num_weights, quantization)
    require_free_disk(target, total)
    config, num_plain = quantize_model(model, config, quantization)
    num_bytes = write_model(
        model, config, target,
        on_bytes=lambda done: progress("quantizing", min(done, total), total),
    )  # fmt: skip
    progress("quantizing", num_bytes, num_bytes)
    copy_tokenizer_files(source, target)
    return num_weights, num_plain


def quantize_model(
    model: nn.Module, config: dict[str, Any], quantization: Quantization
) -> tuple[dict[str, Any], int]:
    """Quantize a model's matrices in place. Lazy.

    Args:
        model: an mlx-lm model with plain weights.
        config: its config.json.
        quantization: how.

    Returns:
        The config that says so, and how many matrices had to stay plain.

    Raises:
        CheckpointError: the recipe does not fit the family.
    """
    chosen: dict[str, dict[str, Any]] = {}
    plain: list[str] = []
    by_recipe = _recipe_predicate(model, quantization)

    def settings_for(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        settings = by_recipe(path, module)
        if module.weight.shape[-1] % settings["group_size"]:
            plain.append(path)
            return False
        if settings != quantization.settings:
            chosen[path] = settings
        return settings

    if mx.cuda.is_available():  # cut columns lie the other way round; mx.quantize ignores strides
        model.update(tree_map(mx.contiguous, model.parameters()))
    nn.quantize(
        model, quantization.group_size, quantization.bits, mode=quantization.mode,
        class_predicate=settings_for,
    )  # fmt: skip
    described = {**quantization.settings, **chosen}
    kept = {key: value for key, value in config.items() if not key.startswith("quantization")}
    return {**kept, "quantization": described, "quantization_config": described}, len(plain)


def _recipe_predicate(
    model: nn.Module, quantization: Quantization
) -> Callable[[str, nn.Module], dict[str, Any]]:
    if quantization.recipe is None:
        return lambda path, module: quantization.settings
    from mlx_lm.convert import mixed_quant_predicate_builder

    try:
        predicate = mixed_quant_predicate_builder(
            quantization.recipe, model, quantization.group_size
        )
    except ValueError as error:
        raise CheckpointError(
            f"the recipe {quantization.recipe} needs layers named down_proj, which "
            f"{model.args.model_type} models do not have; give `bits` instead"
        ) from error
    return cast(Callable[[str, nn.Module], dict[str, Any]], predicate)


def _expected_bytes(num_weights: int, quantization: Quantization) -> int:
    """Return at most how many bytes will be written; recipes take their wider width for all."""
    bits = int(quantization.recipe[-1]) if quantization.recipe else quantization.bits
    # A group has a scale and a bias of up to four bytes each, or a scale of one byte.
    group_bits = 64 if quantization.mode == "affine" else 8
    return int(num_weights * (bits + group_bits / quantization.group_size) / 8)
