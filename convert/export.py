"""A sub-network written as an ordinary checkpoint, for mlx-lm, transformers and the rest."""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.convert.checkpoint_writer import copy_tokenizer_files, model_bytes, write_model
from ifp_mlx.convert.model_card import ModelCard
from ifp_mlx.convert.progress import Progress, no_progress
from ifp_mlx.convert.quantize import Quantization, quantize_model
from ifp_mlx.errors import ArchitectureError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import with_cut_downs
from ifp_mlx.storage.files import require_free_disk, staged_directory
from ifp_mlx.storage.origin import read_origin, write_origin
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model, settled_config
from ifp_mlx.units.model_config import ModelConfig
from ifp_mlx.units.modules import packed_leaves

SELECTION_FILE = "ifp/selection.safetensors"


@dataclasses.dataclass(frozen=True)
class ExportedCheckpoint:
    """What ``export_checkpoint`` made.

    Attributes:
        num_bytes: size of the weights on disk.
        is_plain: no matrix is packed, so transformers can read it.
    """

    path: Path
    num_bytes: int
    is_plain: bool


def export_checkpoint(
    model: nn.Module,
    selection: Selection,
    source: Path,
    target: Path,
    card: ModelCard,
    *,
    quantization: Quantization | None = None,
    dequantize: bool = False,
    dtype: mx.Dtype | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ExportedCheckpoint:
    """Write a compact model as a checkpoint directory, whole or not at all.

    Args:
        model: the compact mlx-lm model; it is not changed.
        selection: the units it keeps, stored beside the weights.
        source: the dense model's checkpoint directory, for config and tokenizer.
        target: a directory that does not exist yet.
        card: what README.md says.
        quantization: quantize the plain (or dequantized) sliced weights, once.
        dequantize: write packed matrices as plain ones, which transformers can read.
        dtype: floating type to write; None keeps the model's.
        overwrite: replace ``target`` if it exists.
        progress: called while writing.

    Raises:
        ArchitectureError: the family's config.json cannot say how many units there are.
        UsageError: the target exists.
        ResourceError: not enough disk.
    """
    from mlx_lm.utils import dequantize_model

    compact = with_cut_downs(model)
    if dequantize or quantization is not None:
        compact = dequantize_model(compact)
    config = _compact_config(settled_config(source), selection.num_kept_units)
    if quantization is not None:
        config, _ = quantize_model(compact, config, quantization)
    config |= _quantization_config(compact)
    total = model_bytes(compact, dtype)
    with staged_directory(target, overwrite=overwrite) as staging:
        require_free_disk(staging, total)
        num_bytes = write_model(
            compact, config, staging, dtype=dtype,
            on_bytes=lambda done: progress("exporting", min(done, total), total),
        )  # fmt: skip
        copy_tokenizer_files(source, staging)
        write_origin(staging, read_origin(source))
        selection.save(staging / SELECTION_FILE)
        (staging / "README.md").write_text(card.text(target.name), encoding="utf-8")
        load_model(staging, lazy=True)
        load_tokenizer(staging)
    return ExportedCheckpoint(target, num_bytes, "quantization" not in config)


def _compact_config(source: ModelConfig, num_kept_units: int) -> dict[str, Any]:
    """Return the content of config.json for K units, of plain weights."""
    family = source.family
    if not family.kind.config_fields:
        raise ArchitectureError(
            f"{family.model_type} models have no key for their width in config.json, so their "
            "sub-networks cannot be exported; ifp generate and ifp chat can use them"
        )
    content = source.content_for(num_kept_units)
    return {k: v for k, v in content.items() if not k.startswith("quantization")}


def _quantization_config(model: nn.Module) -> dict[str, Any]:
    """Return the ``quantization`` entries of config.json for the layers that are packed."""
    packed = packed_leaves(model)
    if not packed:
        return {}
    kinds = list(packed.values())
    default = max(kinds, key=kinds.count)
    others = {path: settings for path, settings in packed.items() if settings != default}
    described = {**default, **others}
    return {"quantization": described, "quantization_config": described}
