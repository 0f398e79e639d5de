"""From a selection to the model that answers: from memory, from disk, or cut from the dense one."""

import collections
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import CheckpointError, ResourceError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import CutModel
from ifp_mlx.slicing.streaming import Adapt, EarlierCut
from ifp_mlx.subnets.compact_store import CompactStore
from ifp_mlx.subnets.dense_model import DenseModel
from ifp_mlx.units.modules import unit_arrays

logger = logging.getLogger(__name__)

DEFAULT_RESIDENT_BYTES = 2 * 10**9


@dataclasses.dataclass(frozen=True)
class _Resident:
    selection: Selection
    cut: CutModel


class CompactModels:
    """The compact models of one dense model.

    Recent ones stay in memory within a byte budget, so switching back to a task costs nothing.

    Args:
        model_path: the checkpoint directory, for messages.
        open_dense: returns the dense model; called when something must be cut from it.
        adapt: an adapter's changes, None without.
        store: where compact models are kept on disk; None for nowhere.
        max_resident_bytes: budget of the units in memory.
    """

    def __init__(
        self,
        model_path: Path,
        open_dense: Callable[[], DenseModel],
        *,
        adapt: Adapt | None = None,
        store: CompactStore | None = None,
        max_resident_bytes: int = DEFAULT_RESIDENT_BYTES,
    ):
        self._model_path = model_path
        self._open_dense = open_dense
        self._adapt = adapt
        self._store = store
        self._max_resident_bytes = max_resident_bytes
        self._resident: collections.OrderedDict[str, _Resident] = collections.OrderedDict()
        self._released: set[str] = set()

    def limit_resident_bytes(self, max_resident_bytes: int) -> None:
        """Change the budget of the units in memory; the oldest go."""
        self._max_resident_bytes = max_resident_bytes
        self._evict()

    def get(self, selection: Selection, *, keep_on_disk: bool) -> CutModel:
        """Return the compact model of a selection. Evaluates.

        Args:
            selection: which units.
            keep_on_disk: read it from the disk if it is there, and leave it there if not.

        Returns:
            The model; ``seconds`` is 0 if it was in memory.

        Raises:
            CheckpointError: it holds values that are not finite.
            ResourceError: a large model's sub-network does not fit in memory.
        """
        digest = selection.digest
        self._released.discard(digest)
        if digest in self._resident:
            self._resident.move_to_end(digest)
            return dataclasses.replace(self._resident[digest].cut, seconds=0.0, is_stored=False)
        store = self._store if keep_on_disk else None
        compact = store.load(selection) if store is not None else None
        if compact is None:
            compact = self._cut(selection, to_keep=keep_on_disk)
            if store is not None and self._open_dense().is_small:
                try:
                    store.store(selection, compact)
                except ResourceError as error:
                    logger.warning("the sub-network's weights are not kept: %s", error)
            compact = dataclasses.replace(compact, stored=None)
        self._resident[digest] = _Resident(selection, compact)
        self._evict()
        return compact

    def release(self, selection: Selection) -> None:
        """Say that a compact model in use is not needed any more.

        It stays in memory for as long as there is room. Where there is none, the next one is made
        of it layer by layer, and it is gone.
        """
        self._released.add(selection.digest)

    def is_resident(self, selection: Selection) -> bool:
        """Return whether a compact model is in memory, whole."""
        return selection.digest in self._resident

    def _cut(self, selection: Selection, *, to_keep: bool) -> CutModel:
        start = time.perf_counter()
        cut = self._open_dense().cut(
            selection, self._adapt, self._closest(selection), to_keep=to_keep
        )
        _require_finite(cut.model, self._model_path)
        return dataclasses.replace(cut, seconds=time.perf_counter() - start)

    def _closest(self, selection: Selection) -> EarlierCut | None:
        """Return the sub-network in memory that has most of the units of another."""
        alike = [
            resident
            for resident in self._resident.values()
            if resident.selection.pick.shape == selection.pick.shape
        ]
        if not alike:
            return None
        closest = max(alike, key=lambda resident: resident.selection.mean_overlap(selection))
        model, digest = closest.cut.model, closest.selection.digest
        unit_bytes = sum(array.nbytes for array in unit_arrays(model).values())
        dense = self._open_dense()
        is_disposable = digest in self._released and not dense.has_room_for(selection, unit_bytes)
        if is_disposable:
            del self._resident[digest]
        return EarlierCut(closest.selection, model, is_disposable)

    def _evict(self) -> None:
        sizes = {
            digest: sum(array.nbytes for array in unit_arrays(resident.cut.model).values())
            for digest, resident in self._resident.items()
        }
        total_bytes = sum(sizes.values())
        while total_bytes > self._max_resident_bytes and len(self._resident) > 1:
            digest, _ = self._resident.popitem(last=False)
            total_bytes -= sizes[digest]


def _require_finite(model: nn.Module, path: Path) -> None:
    floats = [a for a in unit_arrays(model).values() if mx.issubdtype(a.dtype, mx.floating)]
    sums = mx.stack([array.astype(mx.float32).sum() for array in floats])
    if not mx.isfinite(sums).all().item():
        raise CheckpointError(f"{path} has weights that are not finite; convert it again")
