"""From a selection to the model that answers: from memory, from disk, or cut from the dense one."""

import collections
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.adapters.adapter import Adapter
from ifp_mlx.errors import CheckpointError, ResourceError
from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.selection import Selection
from ifp_mlx.storage import checkpoint
from ifp_mlx.subnets import memory
from ifp_mlx.subnets.base_model import Adapt, BaseModel, total_parameters
from ifp_mlx.subnets.compact_store import CompactModel, CompactStore, selection_digest
from ifp_mlx.units import ffn

DEFAULT_RESIDENT_BYTES = 2 * 10**9


@dataclasses.dataclass(frozen=True)
class SubNetwork:
    """A model ready to answer, and where it came from.

    Attributes:
        model: the compact model, or the dense one.
        selection: the kept units; None for the dense model.
        selector: what chose them; ``dense`` for the dense model.
        task: the description that they were chosen for, if there was one.
        num_kept_units: K.
        num_units: F.
        from_cache: the selection was read from the cache, nothing was selected.
        reused_task: the description of another cached task whose sub-network serves this one.
        reuse_overlap: share of kept units that the two tasks have in common.
        selection_s: seconds to select, 0 from the cache.
        requantization_error: relative error of quantizing columns of down projections again; 0
            where that was not needed.
        slicing_s: seconds to slice or load it, 0 when the compact model was still resident.
        weights_from_disk: the compact model was stored by an earlier run, nothing was sliced.
        active_parameters: parameters of ``model``.
        total_parameters: parameters of the dense model.
    """

    model: nn.Module
    selection: Selection | None
    selector: str
    task: str | None
    num_kept_units: int
    num_units: int
    from_cache: bool = False
    reused_task: str | None = None
    reuse_overlap: float | None = None
    selection_s: float = 0.0
    slicing_s: float = 0.0
    weights_from_disk: bool = False
    requantization_error: float = 0.0
    active_parameters: int = 0
    total_parameters: int = 0


class CompactModels:
    """The compact models of one dense model.

    Recent ones stay in memory within a byte budget, so switching back to a task costs nothing.

    Args:
        model_path: the checkpoint directory, for messages.
        open_base: returns the dense model; called when something must be cut from it.
        adapt: an adapter's changes, None without.
        compensation: adds the removed units' mean contribution as a bias.
        store: where compact models are kept on disk; None for nowhere.
        max_resident_bytes: budget of the FFN units in memory.
        on_warning: called with one line for the user.
    """

    def __init__(
        self,
        model_path: Path,
        open_base: Callable[[], BaseModel],
        *,
        adapt: Adapt | None = None,
        compensation: Calibration | None = None,
        store: CompactStore | None = None,
        max_resident_bytes: int = DEFAULT_RESIDENT_BYTES,
        on_warning: Callable[[str], None] = lambda line: None,
    ):
        self._model_path = model_path
        self._open_base = open_base
        self._adapt = adapt
        self._compensation = compensation
        self._store = store
        self._max_resident_bytes = max_resident_bytes
        self._on_warning = on_warning
        self._resident: collections.OrderedDict[str, CompactModel] = collections.OrderedDict()

    def resident(self, selection: Selection) -> CompactModel | None:
        """Return the compact model of a selection if it is in memory. Counts as a use."""
        digest = selection_digest(selection)
        if digest not in self._resident:
            return None
        self._resident.move_to_end(digest)
        return self._resident[digest]

    def make(self, selection: Selection, *, keep_on_disk: bool) -> CompactModel:
        """Return the compact model of a selection that is not in memory. Evaluates.

        Args:
            selection: which units.
            keep_on_disk: read it from the disk if it is there, and leave it there if not.

        Raises:
            CheckpointError: it holds values that are not finite.
            ResourceError: a large model's sub-network does not fit in memory.
        """
        store = self._store if keep_on_disk else None
        compact = store.load(selection) if store is not None else None
        if compact is None:
            compact = self._cut(selection)
            if store is not None and self._open_base().is_small:
                try:
                    store.store(selection, compact)
                except ResourceError as error:
                    self._on_warning(f"the sub-network's weights are not kept: {error}")
        self._resident[selection_digest(selection)] = compact
        self._evict()
        return compact

    def _cut(self, selection: Selection) -> CompactModel:
        start = time.perf_counter()
        base = self._open_base()
        cut = base.cut(selection, adapt=self._adapt, compensation=self._compensation)
        _require_finite(cut.model, self._model_path)
        return CompactModel(
            cut.model,
            cut.requantization_error,
            total_parameters(base),
            time.perf_counter() - start,
        )

    def _evict(self) -> None:
        sizes = {
            d: sum(a.nbytes for a in ffn.ffn_arrays(c.model)) for d, c in self._resident.items()
        }
        total_bytes = sum(sizes.values())
        while total_bytes > self._max_resident_bytes and len(self._resident) > 1:
            digest, _ = self._resident.popitem(last=False)
            total_bytes -= sizes[digest]


def dense_identity(
    model_path: Path, adapter: Adapter | None, *, adapted: bool, exact_down: bool
) -> dict[str, Any]:
    """Return what the values of a checkpoint's compact models depend on, but for the selection.

    Args:
        model_path: the checkpoint directory.
        adapter: the adapter that belongs to it: it was found to fit when a model was stored.
        adapted: whether its changes are applied.
        exact_down: as in ``open_base_model``.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    return {
        "base": checkpoint.fingerprint(model_path),
        "files": [(Path(name).name, *rest) for name, *rest in checkpoint.file_states(model_path)],
        "adapter": adapter.fingerprint if adapter is not None else "",
        "adapted": adapted,
        "exact_down": exact_down,
        # These decide which type is computed in.
        "device": str(mx.default_device()),
        "memory_bytes": memory.usable_memory_bytes(),
    }


def _require_finite(model: nn.Module, path: Path) -> None:
    floats = [a for a in ffn.ffn_arrays(model) if mx.issubdtype(a.dtype, mx.floating)]
    sums = mx.stack([array.astype(mx.float32).sum() for array in floats])
    if not mx.isfinite(sums).all().item():
        raise CheckpointError(f"{path} has weights that are not finite; convert it again")
