"""A model spread over several machines by mlx-lm's own sharding, under ``mlx.launch``.

Every machine selects for itself, which comes out alike, and keeps its share of each matrix.
"""

import os
import time
from pathlib import Path

import mlx.core as mx

from ifp_mlx.errors import ArchitectureError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import CutModel, ModelSize, slice_model
from ifp_mlx.storage.weights import load_model
from ifp_mlx.units.modules import family_of, named_arrays


def several_machines() -> mx.distributed.Group | None:
    """Return the processes that ``mlx.launch`` started together; None for one alone."""
    if "MLX_RANK" not in os.environ:  # what it sets; without it no backend is looked for
        return None
    group = mx.distributed.init()
    return group if group.size() > 1 else None


def load_share(
    path: Path, selection: Selection | None, group: mx.distributed.Group
) -> tuple[CutModel, ModelSize]:
    """Return this machine's share of a sub-network, and the size of all shares. Evaluates.

    One matrix at a time is in memory beside the share; the checkpoint is read whole.

    Args:
        path: a checkpoint directory.
        selection: its units; None for the whole model.
        group: of machines that all call this.

    Raises:
        ArchitectureError: mlx-lm has no sharding for this family, or none into so many shares.
        CheckpointError: the checkpoint is damaged.
    """
    start = time.perf_counter()
    model, _ = load_model(path, "auto", lazy=True)
    source = size = ModelSize.of(model)
    if selection is not None:
        model = slice_model(model, selection)  # the whole one is let go: its matrices must not stay
        size = ModelSize.of(model)
    name = family_of(model).model_type
    if not hasattr(model, "shard"):
        raise ArchitectureError(
            f"mlx-lm spreads no {name} models over several machines; run this on one"
        )
    try:
        model.shard(group)
    except ValueError as error:
        raise ArchitectureError(
            f"this {name} model cannot be spread over {group.size()} machines ({error})"
        ) from error
    for array in named_arrays(model).values():
        mx.eval(array)
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))  # nobody waits in vain later
    return CutModel(model, source, seconds=time.perf_counter() - start), size
