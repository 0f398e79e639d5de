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
    RequantizationError,
    slice_model,
)
from ifp_mlx.slicing.kernel_check import check_quantized_kernels
from ifp_mlx.slicing.layerwise import layerwise_model
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
    ) -> CutModel:
        """Return the compact model of a selection, of the model that ``adapt`` makes. Evaluates.

        ``earlier`` is another one whose units need not be read again, where units can be taken
        over as they are.
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
    return KeptModel(path, dtype, sizes, options, is_small=is_small, lazy=lazy)


class KeptModel:
    """A dense model that stays in memory once something has needed the whole of it.

    Args:
        path: the checkpoint directory.
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
        self._adapted: tuple[Adapt, nn.Module] | None = None
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
    ) -> CutModel:
        """Return the compact model of a selection. Evaluates.

        Nothing but the sub-network is read from the disk as long as nothing has needed more. Of a
        small model everything is read: later tasks are cut from it.
        """
        if not self.is_small and not self._is_loaded:
            return _checked(
                load_subnetwork(
                    self._path,
                    selection,
                    dtype=self._dtype,
                    options=self._options,
                    base=self.skeleton if adapt is None else None,
                    adapt=adapt,
                    earlier=_reusable(earlier, adapt),
                )
            )
        start = time.perf_counter()
        source = self.whole()
        if adapt is not None:
            if self._adapted is None or self._adapted[0] != adapt:
                self._adapted = (adapt, adapt(source))
            source = self._adapted[1]
        error = RequantizationError()
        compact = slice_model(source, selection, self._options, error)
        mx.eval(compact.parameters())
        return _checked(
            CutModel(
                model=compact,
                source=self.size,
                requantization_error=error.relative,
                seconds=time.perf_counter() - start,
            )
        )


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
    ) -> CutModel:
        """Return the compact model of a selection, read from the disk. Evaluates.

        Raises:
            ResourceError: it does not fit in memory; the message says which K does.
        """
        self._require_memory(selection.num_kept_units)
        return _checked(
            load_subnetwork(
                self._path,
                selection,
                dtype=self._dtype,
                options=self._options,
                base=self.skeleton if adapt is None else None,
                adapt=adapt,
                earlier=_reusable(earlier, adapt),
            )
        )

    def _require_memory(self, num_kept_units: int) -> None:
        if not self._options.force:
            memory.require_memory(
                self.sizes,
                num_kept_units,
                self._options.context_tokens,
                memory.usable_memory_bytes(self._options.memory_bytes),
            )


def _reusable(earlier: EarlierCut | None, adapt: Adapt | None) -> EarlierCut | None:
    """Return an earlier cut if its units are what would be read: bit for bit, unchanged."""
    if earlier is None or adapt is not None:
        return None
    return earlier if family_of(earlier.model).kind.columns is None else None


def _checked(cut: CutModel) -> CutModel:
    """Return a compact model that no kernel of this machine computes wrongly. Evaluates."""
    return dataclasses.replace(cut, model=check_quantized_kernels(cut.model))
