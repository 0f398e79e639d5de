"""Loading a sub-network without loading the model that it is cut from.

Units are read layer by layer, only the selected ones, straight into the compact model; their full
matrices never exist in memory. Peak memory is the compact model and the working set of one layer.
Everything that holds no units is read as mlx-lm reads it.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ifp_mlx.errors import CheckpointError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import (
    DEFAULT_CUT,
    CutModel,
    CutOptions,
    ModelSize,
    ResidentUnits,
    UnitSource,
    compact_skeleton,
    fill_layers,
)
from ifp_mlx.slicing.gather import take_rows
from ifp_mlx.slicing.repacking import (
    RequantizationError,
    repacking_for,
    with_changes_packed,
)
from ifp_mlx.slicing.stored_units import StoredParts, StoredUnits
from ifp_mlx.slicing.unit_file import UnitFileUnits
from ifp_mlx.storage.positioned_reads import PositionedReader
from ifp_mlx.storage.weights import load_model, stored_tensors
from ifp_mlx.units.kinds import Part
from ifp_mlx.units.modules import (
    compute_dtype,
    copy_module,
    dequantized,
    family_of,
    part_arrays,
    part_of,
    plain_linear,
    replace_part,
    unit_layers,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EarlierCut:
    """A sub-network in memory whose units need not be read again.

    Attributes:
        selection: its units.
        model: of the same checkpoint, in the same type.
        is_disposable: nothing needs it any more: its layers are released as they are replaced.
    """

    selection: Selection
    model: nn.Module
    is_disposable: bool


Adapt = Callable[[nn.Module], nn.Module]
"""An adapter's changes: from a model to the changed one, which shares what is unchanged."""


def load_subnetwork(
    path: Path,
    selection: Selection,
    *,
    dtype: mx.Dtype | None = None,
    options: CutOptions = DEFAULT_CUT,
    base: nn.Module | None = None,
    adapt: Adapt | None = None,
    earlier: EarlierCut | None = None,
    on_layer: Callable[[int, int], Any] = lambda done, of: None,
) -> CutModel:
    """Read the compact model of a selection from a checkpoint. Evaluates.

    Args:
        path: a checkpoint directory, quantized or not.
        selection: validated against the checkpoint before anything is read.
        dtype: None computes as the checkpoint is stored; a floating type dequantizes and casts.
        options: how packed columns are kept.
        base: the model to share everything without units with, in the same ``dtype``; its units
            are not touched. None loads what is needed.
        adapt: changes to the model. They can touch any weight, so matrices with units are then
            loaded whole, one layer at a time.
        earlier: another sub-network, of a kind whose units are rows of every part: only those that
            it lacks are read.
        on_layer: called with layers done and their number.

    Raises:
        CheckpointError: the checkpoint is damaged.
        SelectionError: the selection does not fit the checkpoint.
    """
    start = time.perf_counter()
    stored, _ = load_model(path, lazy=True)
    selection.validate(stored)
    if base is None:
        base = stored if dtype is None else load_model(path, dtype, lazy=True)[0]
        base = base if adapt is None else adapt(base)
    size = ModelSize.of(base if adapt is None or dtype is not None else stored)
    error = RequantizationError()
    repacking = repacking_for(base, selection.num_kept_units)
    if adapt is not None and not options.exact_down:
        base = with_changes_packed(base, repacking, error)
    compact = compact_skeleton(base, selection)
    with PositionedReader() as reader:
        source = _open_source(path, stored, reader, dtype, adapt)
        in_parts = not isinstance(source, _WholeLayers)
        used_unit_file = isinstance(source, UnitFileUnits)
        if dtype is not None:
            source = _CastUnits(source, stored, dtype)
        if earlier is not None:
            source = _UnitsAtHand(source, earlier)
        del stored, base  # what remains of them is in ``compact`` and ``source``
        filling = fill_layers(compact, selection, source, options, error, repacking)
        for num_done, layer in enumerate(filling, start=1):
            mx.eval(
                compact.layers[layer].parameters(),
                error.squared_difference,
                error.squared_reference,
            )
            mx.clear_cache()
            on_layer(num_done, len(selection.pick.layers))
        mx.eval(compact.parameters())
        return CutModel(
            model=compact,
            source=size,
            requantization_error=error.relative,
            seconds=time.perf_counter() - start,
            unit_bytes_read=reader.bytes_read if in_parts else None,
            used_unit_file=used_unit_file,
        )


def _open_source(
    path: Path,
    stored: nn.Module,
    reader: PositionedReader,
    dtype: mx.Dtype | None,
    adapt: Adapt | None,
) -> UnitSource:
    """Return the cheapest way to read units."""
    if adapt is not None:
        return _WholeLayers(adapt(load_model(path, lazy=True)[0]))
    column_dtype = dtype or compute_dtype(stored)
    try:
        parts = StoredParts(stored, stored_tensors(path))
    except CheckpointError:  # stored as another library has it: mlx-lm converts it while loading
        return _WholeLayers(load_model(path, lazy=True)[0])
    rows = StoredUnits(parts, reader, column_dtype)
    try:
        unit_file = UnitFileUnits.open(path, parts, rows, reader, column_dtype)
    except CheckpointError as error:
        logger.warning("%s; reading the checkpoint's own layout instead", error)
        return rows
    return unit_file or rows


class _WholeLayers(ResidentUnits):
    """Units of a lazily loaded model that nothing else refers to.

    Each layer is read whole and released when the next one is asked for.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._parts = family_of(model).kind.parts

    def take(self, layer: int, part: Part, units: mx.array) -> dict[str, mx.array]:
        for earlier in [index for index in self._layers if index < layer]:
            for whole in self._parts:
                replace_part(self._layers[earlier], whole, nn.Module())
            del self._layers[earlier]
        return super().take(layer, part, units)


class _UnitsAtHand:
    """Units of an earlier sub-network, and of another source what it lacks.

    Args:
        source: the other one.
        earlier: the sub-network; all of its kind's units are rows.
    """

    def __init__(self, source: UnitSource, earlier: EarlierCut):
        self._source = source
        self._earlier = earlier
        self._positions = {layer: at for at, layer in enumerate(earlier.selection.pick.layers)}
        self._parts = family_of(earlier.model).kind.parts
        self._layers = unit_layers(earlier.model)

    def take(self, layer: int, part: Part, units: mx.array) -> dict[str, mx.array]:
        if self._earlier.is_disposable:
            self._release_before(layer)
        pick = self._earlier.selection.pick
        wanted, present = np.array(units), np.array(pick.units(self._positions[layer]))
        rows = np.minimum(np.searchsorted(present, wanted), len(present) - 1)
        lacking = np.flatnonzero(present[rows] != wanted)
        arrays = {
            name: take_rows(array, mx.array(rows))
            for name, array in part_arrays(self._layers[layer], part).items()
        }
        if len(lacking):
            read = self._source.take(layer, part, mx.array(wanted[lacking]))
            for name, array in arrays.items():
                array[mx.array(lacking)] = read[name]
        return arrays

    def whole(self, layer: int, part: Part) -> nn.Module:
        return self._source.whole(layer, part)

    def _release_before(self, layer: int) -> None:
        for done in [index for index in self._layers if index < layer]:
            for part in self._parts:
                holder = part_of(self._layers[done], part)
                for name in part_arrays(self._layers[done], part):
                    del holder[name]
            del self._layers[done]


class _CastUnits:
    """Units of another source as plain weights of a floating type.

    Args:
        source: the other one.
        stored: the model, loaded lazily; says how each part is packed.
        dtype: the type.
    """

    def __init__(self, source: UnitSource, stored: nn.Module, dtype: mx.Dtype):
        self._source = source
        self._layers = unit_layers(stored)
        self._dtype = dtype

    def take(self, layer: int, part: Part, units: mx.array) -> dict[str, mx.array]:
        arrays = self._source.take(layer, part, units)
        if "scales" in arrays:
            packed = copy_module(part_of(self._layers[layer], part))
            packed.update(arrays)
            arrays["weight"] = dequantized(packed, self._dtype)
        return {
            name: array.astype(self._dtype)
            for name, array in arrays.items()
            if name not in ("scales", "biases")
        }

    def whole(self, layer: int, part: Part) -> nn.Module:
        linear = self._source.whole(layer, part)
        bias = linear.get("bias")
        weight = dequantized(linear, self._dtype).astype(self._dtype)
        return plain_linear(weight, None if bias is None else bias.astype(self._dtype))
