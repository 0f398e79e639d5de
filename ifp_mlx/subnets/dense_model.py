"""The dense checkpoint as an assistant uses it: read by selectors, cut into sub-networks.

A model that fits beside its sub-networks is kept in memory. Of a larger one, only what a
sub-network shares with it is kept: selectors read with one layer in memory at a time, sub-networks
are read from the disk.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import (
    DEFAULT_CUT,
    CutModel,
    CutOptions,
    ModelSize,
    slice_model,
)
from ifp_mlx.slicing.forms import as_computed, in_types_of
from ifp_mlx.slicing.kernel_check import check_quantized_kernels
from ifp_mlx.slicing.layerwise import layerwise_model
from ifp_mlx.slicing.repacking import (
    Repacking,
    RequantizationError,
    repacking_for,
    with_changes_packed,
)
from ifp_mlx.slicing.streaming import Adapt, EarlierCut, load_subnetwork
from ifp_mlx.storage import weights
from ifp_mlx.subnets import memory
from ifp_mlx.units.modules import family_of

SMALL_SHARE_OF_MEMORY = 1 / 16
"""A dense model that takes at most this much of the machine's memory is small: nothing of it needs
predicting, and its sub-networks' weights may be kept on disk."""


class DenseModel(Protocol):
    """A dense checkpoint that sub-networks are cut from."""

    @property
    def is_small(self) -> bool:
        """Whether it is so small against the machine's memory that nothing needs predicting."""

    @property
    def is_kept(self) -> bool:
        """Whether the whole of it stays in memory."""

    @property
    def sizes(self) -> memory.CheckpointSizes:
        """What its parts take in the type that it computes in."""

    @property
    def reader(self) -> nn.Module:
        """The model for a selector's pass; its weights are not to be evaluated by name."""

    @property
    def skeleton(self) -> nn.Module:
        """The model for what its modules say; its weights need not be in memory."""

    @property
    def size(self) -> ModelSize:
        """How large it is; nothing is loaded."""

    def whole(self) -> nn.Module:
        """Return the whole model in memory."""

    def has_room_for(self, selection: Selection, other_bytes: int) -> bool:
        """Return whether the sub-network of a selection fits beside some other bytes."""

    def cut(
        self,
        selection: Selection,
        adapt: Adapt | None = None,
        earlier: EarlierCut | None = None,
        *,
        to_keep: bool = True,
    ) -> CutModel:
        """Return the compact model of a selection, of the model that ``adapt`` makes. Evaluates.

        ``earlier`` is another one whose units need not be read again, where units can be taken
        over as they are. What is not ``to_keep`` is not packed where packed weights are computed
        with unpacked.
        """


def open_dense_model(
    path: Path, options: CutOptions = DEFAULT_CUT, *, lazy: bool = False
) -> DenseModel:
    """Return a checkpoint, kept in memory if it fits there beside a sub-network and its KV cache.

    Args:
        path: a checkpoint directory.
        options: how it is cut, and what it may take.
        lazy: leave the weights of a kept model on disk until they are used.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    stored, _ = weights.load_model(path, lazy=True)
    dtype = weights.automatic_dtype(stored)
    sizes = memory.checkpoint_sizes(path, dtype, exact_down=options.exact_down)
    available_bytes = memory.usable_memory_bytes(options.memory_bytes)
    if not sizes.fits_beside_subnetwork(options.context_tokens, available_bytes):
        return StreamedModel(path, dtype, sizes, options)
    is_small = sizes.dense_bytes <= SMALL_SHARE_OF_MEMORY * available_bytes
    if is_small:  # of a large one, what is cut is checked each time
        weights.require_finite(path)
    return KeptModel(path, stored, dtype, sizes, options, is_small=is_small, lazy=lazy)


class KeptModel:
    """A dense model that stays in memory once something has needed the whole of it.

    Args:
        path: the checkpoint directory.
        stored: the model as it is stored, loaded lazily.
        dtype: the type to compute in; None as it is stored.
        sizes: of the checkpoint in that type.
        options: how it is cut.
        is_small: as ``DenseModel`` says.
        lazy: leave the weights on disk until they are used.
    """

    is_kept = True

    def __init__(
        self,
        path: Path,
        stored: nn.Module,
        dtype: mx.Dtype | None,
        sizes: memory.CheckpointSizes,
        options: CutOptions,
        *,
        is_small: bool,
        lazy: bool,
    ):
        self.is_small = is_small
        self.sizes = sizes
        self._path = path
        self._dtype = dtype
        self._options = options
        self.skeleton, _ = weights.load_model(path, dtype, lazy=True)
        self._is_loaded = False
        self._stored = self.skeleton if dtype is None else stored
        self._changed: _ChangedModel | None = None
        if not lazy:
            mx.eval(self.whole().parameters())

    @property
    def reader(self) -> nn.Module:
        """The model, which is loaded as it is used."""
        return self.whole()

    @functools.cached_property
    def size(self) -> ModelSize:
        """How large it is; nothing is loaded."""
        return ModelSize.of(self.skeleton)

    def whole(self) -> nn.Module:
        """Return the model, which is loaded as it is used."""
        self._is_loaded = True
        return self.skeleton

    def has_room_for(self, selection: Selection, other_bytes: int) -> bool:
        """Return True: it was kept because there is room for sub-networks beside it."""
        return True

    def cut(
        self,
        selection: Selection,
        adapt: Adapt | None = None,
        earlier: EarlierCut | None = None,
        *,
        to_keep: bool = True,
    ) -> CutModel:
        """Return the compact model of a selection. Evaluates.

        Nothing but the sub-network is read from the disk as long as nothing has needed more. Of a
        small model everything is read: later tasks are cut from it.
        """
        if not self.is_small and not self._is_loaded:
            return _streamed(
                self._path, self.skeleton, self._dtype, selection, self._options, adapt, earlier
            )
        start = time.perf_counter()
        if adapt is not None and (self._changed is None or self._changed.adapt != adapt):
            self._changed = _ChangedModel(adapt, self._stored, self._dtype)
        as_stored = self._dtype is None or self._options.as_stored
        if as_stored or (adapt is not None and to_keep):
            cut = self._cut_as_stored(selection)
        else:
            source = self.whole() if self._changed is None else self._changed.computed
            unpacked = dataclasses.replace(self._options, exact_down=True)
            compact = slice_model(source, selection, unpacked)
            mx.eval(compact.parameters())
            cut = CutModel(compact, self.size, stored=in_types_of(compact, self._stored))
        return _checked(
            dataclasses.replace(cut, seconds=time.perf_counter() - start), self._options
        )

    def _cut_as_stored(self, selection: Selection) -> CutModel:
        """Return a compact model that is no larger than its source, to compute with or to write."""
        source, error, repacking, shared = self._stored, RequantizationError(), None, None
        if self._changed is not None:
            if self._options.exact_down:
                source, shared = self._changed.model, self._changed.computed
            else:
                repacking = repacking_for(self._changed.model, selection.num_kept_units)
                source, error, shared = self._changed.packed(repacking)
        stored = slice_model(source, selection, self._options, error, repacking)
        mx.eval(stored.parameters())
        model = stored
        if not self._options.as_stored:
            model = as_computed(stored, self._dtype, like=shared)
            mx.eval(model.parameters())
        # An unchanged model that is computed unpacked is cut without being rounded.
        is_as_computed = self._dtype is None
        may_be_kept = is_as_computed if self._changed is None else not self._options.exact_down
        return CutModel(
            model,
            ModelSize.of(self._stored) if model is stored else self.size,
            requantization_error=error.relative,
            stored=stored if may_be_kept else None,
        )


class _ChangedModel:
    """What an adapter makes of a model.

    Args:
        adapt: the adapter's changes.
        stored: the model as it is stored.
        dtype: the type to compute in; None as it is stored.

    Attributes:
        adapt: the adapter's changes.
        model: with them, plain where it was packed before. Lazy.
    """

    def __init__(self, adapt: Adapt, stored: nn.Module, dtype: mx.Dtype | None):
        self.adapt = adapt
        self.model = adapt(stored)
        self._dtype = dtype
        self._packed: dict[Repacking, tuple[nn.Module, RequantizationError, nn.Module]] = {}

    @functools.cached_property
    def computed(self) -> nn.Module:
        """The model in the type to compute in; nothing is packed again."""
        return as_computed(self.model, self._dtype)

    def packed(self, repacking: Repacking) -> tuple[nn.Module, RequantizationError, nn.Module]:
        """Return the model with all packed again that holds no units.

        Returns:
            The model, the error of packing so far, and the same model to compute with.
        """
        if repacking not in self._packed:
            error = RequantizationError()
            packed = with_changes_packed(self.model, repacking, error)
            self._packed[repacking] = packed, error, as_computed(packed, self._dtype)
        packed, error, computed = self._packed[repacking]
        return packed, dataclasses.replace(error), computed


class StreamedModel:
    """A dense model on the disk.

    Args:
        path: the checkpoint directory.
        dtype: the type to compute in; None as it is stored.
        sizes: of the checkpoint in that type.
        options: how it is cut, and what it may take.
    """

    is_small = False
    is_kept = False

    def __init__(
        self,
        path: Path,
        dtype: mx.Dtype | None,
        sizes: memory.CheckpointSizes,
        options: CutOptions,
    ):
        self._path = path
        self._dtype = dtype
        self.sizes = sizes
        self._options = options
        # What sub-networks share with one another; its arrays with units are never evaluated.
        self.skeleton, _ = weights.load_model(path, dtype, lazy=True)

    @functools.cached_property
    def reader(self) -> nn.Module:
        """The model with one layer in memory at a time."""
        return layerwise_model(self._path, self._dtype, shared=self.skeleton)

    @functools.cached_property
    def size(self) -> ModelSize:
        """How large it is; nothing is loaded."""
        return ModelSize.of(self.skeleton)

    def whole(self) -> nn.Module:
        """Return the whole model, loaded anew at each call.

        Raises:
            ResourceError: it does not fit in memory.
        """
        self._require_memory(self.sizes.amounts.num_units)
        return weights.load_model(self._path, self._dtype)[0]

    def has_room_for(self, selection: Selection, other_bytes: int) -> bool:
        """Return whether the sub-network of a selection fits beside some other bytes."""
        options = self._options
        needed = self.sizes.predict(selection.num_kept_units, options.context_tokens).total_bytes
        return needed + other_bytes <= memory.usable_memory_bytes(options.memory_bytes)

    def cut(
        self,
        selection: Selection,
        adapt: Adapt | None = None,
        earlier: EarlierCut | None = None,
        *,
        to_keep: bool = True,
    ) -> CutModel:
        """Return the compact model of a selection, read from the disk. Evaluates.

        Raises:
            ResourceError: it does not fit in memory; the message says which K does.
        """
        self._require_memory(selection.num_kept_units)
        return _streamed(
            self._path, self.skeleton, self._dtype, selection, self._options, adapt, earlier
        )

    def _require_memory(self, num_kept_units: int) -> None:
        if not self._options.force:
            memory.require_memory(
                self.sizes,
                num_kept_units,
                self._options.context_tokens,
                memory.usable_memory_bytes(self._options.memory_bytes),
            )


def _streamed(
    path: Path,
    skeleton: nn.Module,
    dtype: mx.Dtype | None,
    selection: Selection,
    options: CutOptions,
    adapt: Adapt | None,
    earlier: EarlierCut | None,
) -> CutModel:
    """Return a compact model that is read from the disk; ``skeleton`` is in ``dtype``."""
    in_other_form = options.as_stored and dtype is not None
    cut = load_subnetwork(
        path,
        selection,
        dtype=None if options.as_stored else dtype,
        options=options,
        base=None if in_other_form or adapt is not None else skeleton,
        adapt=adapt,
        earlier=None if in_other_form else _reusable(earlier, adapt),
    )
    return _checked(cut, options)


def _reusable(earlier: EarlierCut | None, adapt: Adapt | None) -> EarlierCut | None:
    """Return an earlier cut if its units are what would be read: bit for bit, unchanged."""
    if earlier is None or adapt is not None:
        return None
    return earlier if family_of(earlier.model).kind.columns is None else None


def _checked(cut: CutModel, options: CutOptions) -> CutModel:
    """Return a compact model that no kernel of this machine computes wrongly. Evaluates."""
    if options.as_stored:  # it is written, not computed with
        return cut
    return dataclasses.replace(cut, model=check_quantized_kernels(cut.model))
