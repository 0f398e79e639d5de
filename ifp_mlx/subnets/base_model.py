"""The dense checkpoint as an assistant uses it: read by selectors, cut into sub-networks.

A small model is simply kept in memory. Of a large one, only what a sub-network shares with it is
kept: selectors read with one layer in memory at a time, sub-networks are read from the disk.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import RequantizationError, slice_model
from ifp_mlx.slicing.kernel_check import check_quantized_kernels
from ifp_mlx.slicing.layerwise import layerwise_model
from ifp_mlx.slicing.streaming import load_subnetwork
from ifp_mlx.storage import checkpoint
from ifp_mlx.subnets import memory

KEPT_SHARE_OF_MEMORY = 1 / 16
"""A dense model that takes at most this much of the machine's memory is kept."""

DEFAULT_CONTEXT_TOKENS = 4096
"""The length of conversation that memory is predicted for."""

Adapt = Callable[[nn.Module], nn.Module]


@dataclasses.dataclass(frozen=True)
class CutModel:
    """A compact model, evaluated.

    Attributes:
        model: the compact model.
        requantization_error: relative error of quantizing down projections again, 0 without.
    """

    model: nn.Module
    requantization_error: float


class BaseModel(Protocol):
    """A dense checkpoint that sub-networks are cut from."""

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""

    @property
    def is_small(self) -> bool:
        """Whether it is so small against the machine's memory that nothing needs predicting."""

    @property
    def reader(self) -> nn.Module:
        """The dense model for a selector's pass; its weights are not to be evaluated by name."""

    def dense(self) -> nn.Module:
        """Return the whole model in memory."""

    def cut(
        self,
        selection: Selection,
        *,
        adapt: Adapt | None = None,
        compensation: Calibration | None = None,
    ) -> CutModel:
        """Return the compact model of a selection, of the model that ``adapt`` makes. Evaluates."""


def open_base_model(
    path: Path,
    *,
    exact_down: bool = False,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    force: bool = False,
    lazy: bool = False,
    on_warning: Callable[[str], None] = lambda line: None,
) -> BaseModel:
    """Return a checkpoint, kept in memory if it is small against the machine.

    Args:
        path: a checkpoint directory.
        exact_down: do not quantize down projections again.
        context_tokens: the conversation that a sub-network must have memory for.
        force: load what is predicted not to fit.
        lazy: leave the weights of a small model on disk until they are used.
        on_warning: called with lines for the user.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    stored, _ = checkpoint.load_model(path, lazy=True)
    dtype = checkpoint.automatic_dtype(stored)
    sizes = memory.checkpoint_sizes(path, dtype, exact_down=exact_down)
    dense_bytes = sizes.shared_bytes + sizes.num_units * sizes.dense_unit_bytes
    if dense_bytes <= KEPT_SHARE_OF_MEMORY * memory.usable_memory_bytes():
        checkpoint.require_finite(path)
        model, config = checkpoint.load_model(path, dtype, lazy=True)
        if not lazy:
            mx.eval(model.parameters())
        return KeptModel(model, config, exact_down, on_warning)
    return StreamedModel(path, dtype, sizes, exact_down, context_tokens, force, on_warning)


class KeptModel:
    """A dense model in memory.

    Args:
        model: evaluated, or evaluated as it is used.
        config: the checkpoint's.
        exact_down: do not quantize down projections again.
        on_warning: called with lines for the user.
    """

    is_small = True

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        exact_down: bool,
        on_warning: Callable[[str], None],
    ) -> None:
        self.config = config
        self.reader = model
        self._exact_down = exact_down
        self._on_warning = on_warning
        self._adapted: tuple[Adapt, nn.Module] | None = None

    def dense(self) -> nn.Module:
        """Return the model."""
        return self.reader

    def cut(
        self,
        selection: Selection,
        *,
        adapt: Adapt | None = None,
        compensation: Calibration | None = None,
    ) -> CutModel:
        """Return the compact model of a selection. Evaluates."""
        source = self.reader
        if adapt is not None:
            if self._adapted is None or self._adapted[0] != adapt:
                self._adapted = (adapt, adapt(self.reader))
            source = self._adapted[1]
        error = RequantizationError()
        compact = slice_model(
            source,
            selection,
            compensation=compensation,
            exact_down=self._exact_down,
            error=error,
        )
        mx.eval(compact.parameters())
        return CutModel(check_quantized_kernels(compact, self._on_warning), error.relative)


class StreamedModel:
    """A dense model on the disk.

    Args:
        path: the checkpoint directory.
        dtype: the type to compute in; None as it is stored.
        sizes: of the checkpoint in that type.
        exact_down: do not quantize down projections again.
        context_tokens: the conversation that a sub-network must have memory for.
        force: load what is predicted not to fit.
        on_warning: called with lines for the user.
    """

    is_small = False

    def __init__(
        self,
        path: Path,
        dtype: mx.Dtype | None,
        sizes: memory.CheckpointSizes,
        exact_down: bool,
        context_tokens: int,
        force: bool,
        on_warning: Callable[[str], None],
    ) -> None:
        self._path = path
        self._dtype = dtype
        self._sizes = sizes
        self._exact_down = exact_down
        self._context_tokens = context_tokens
        self._force = force
        self._on_warning = on_warning
        # What sub-networks share with one another; its FFN arrays are never evaluated.
        self._shared, self.config = checkpoint.load_model(path, dtype, lazy=True)

    @functools.cached_property
    def reader(self) -> nn.Module:
        """The model with one layer in memory at a time."""
        return layerwise_model(self._path, self._dtype, shared=self._shared)

    def dense(self) -> nn.Module:
        """Return the whole model, loaded anew at each call.

        Raises:
            ResourceError: it does not fit in memory.
        """
        self._require_memory(self._sizes.num_units)
        return checkpoint.load_model(self._path, self._dtype)[0]

    def cut(
        self,
        selection: Selection,
        *,
        adapt: Adapt | None = None,
        compensation: Calibration | None = None,
    ) -> CutModel:
        """Return the compact model of a selection, read from the disk. Evaluates.

        Raises:
            ResourceError: it does not fit in memory; the message says which K does.
        """
        self._require_memory(selection.num_kept_units)
        loaded = load_subnetwork(
            self._path,
            selection,
            dtype=self._dtype,
            compensation=compensation,
            exact_down=self._exact_down,
            base=self._shared if adapt is None else None,
            adapt=adapt,
            on_warning=self._on_warning,
        )
        model = check_quantized_kernels(loaded.model, self._on_warning)
        return CutModel(model, loaded.requantization_error)

    def _require_memory(self, num_kept_units: int) -> None:
        if not self._force:
            memory.require_memory(
                self._sizes, num_kept_units, self._context_tokens, memory.usable_memory_bytes()
            )


def total_parameters(base: BaseModel) -> int:
    """Return the number of parameters of the dense model; nothing is loaded."""
    from mlx_lm.utils import get_total_parameters

    return int(get_total_parameters(base.reader))
