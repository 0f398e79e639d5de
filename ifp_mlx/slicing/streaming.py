"""Loading a sub-network without loading the model that it is cut from.

FFN units are read layer by layer, only the selected ones, straight into the compact model; the
full FFN matrices never exist in memory. Peak memory is the compact model and the working set of
one layer. Everything outside the FFNs is read as mlx-lm reads it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ifp_mlx.errors import CheckpointError
from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import (
    GatheredUnits,
    RequantizationError,
    ResidentUnits,
    UnitSource,
    compact_skeleton,
    compute_dtype,
    dequantized,
    fill_layers,
)
from ifp_mlx.slicing.unit_file import LayerTensors, UnitMajorFile
from ifp_mlx.storage.checkpoint import load_model, stored_tensors
from ifp_mlx.storage.positioned_reads import PositionedReader, to_array
from ifp_mlx.storage.tensor_files import StoredTensor
from ifp_mlx.units import ffn

BLOCK_BYTES = 16 * 2**20
"""How much of a row-major down projection is in memory at once."""


@dataclasses.dataclass(frozen=True)
class LoadedSubnetwork:
    """A compact model and what reading it took.

    Attributes:
        model: evaluated.
        requantization_error: relative error of quantizing down projections again; 0 where none
            was.
        ffn_bytes_read: bytes of FFN units read from the disk; None where the checkpoint's form
            did not allow to read parts of it.
        unit_major: the side file was used.
    """

    model: nn.Module
    requantization_error: float
    ffn_bytes_read: int | None
    unit_major: bool


def load_subnetwork(
    path: Path,
    selection: Selection,
    *,
    dtype: mx.Dtype | None = None,
    compensation: Calibration | None = None,
    exact_down: bool = False,
    base: nn.Module | None = None,
    adapt: Callable[[nn.Module], nn.Module] | None = None,
    on_layer: Callable[[int, int], Any] = lambda done, of: None,
    on_warning: Callable[[str], None] = lambda line: None,
) -> LoadedSubnetwork:
    """Read the compact model of a selection from a checkpoint. Evaluates.

    Args:
        path: a checkpoint directory, quantized or not.
        selection: validated against the checkpoint before anything is read.
        dtype: None computes as the checkpoint is stored; a floating type dequantizes and casts.
        compensation: as in ``slice_model``; reads every down projection whole, in blocks.
        exact_down: as in ``slice_model``.
        base: the model to share everything outside the FFNs with, in the same ``dtype``; its FFN
            arrays are not touched. None loads what is needed.
        adapt: an adapter's changes to a model. They can touch any weight, so FFN matrices are then
            loaded whole, one layer at a time.
        on_layer: called with layers done and their number.
        on_warning: called with a line when the side file cannot be used.

    Raises:
        CheckpointError: the checkpoint is damaged.
        SelectionError: the selection does not fit the checkpoint.
    """
    stored, _ = load_model(path, lazy=True)
    selection.validate(stored)
    if base is None:
        base = stored if dtype is None else load_model(path, dtype, lazy=True)[0]
        base = base if adapt is None else adapt(base)
    compact = compact_skeleton(base, selection)
    error = RequantizationError()
    with PositionedReader() as reader:
        source, unit_major = _open_source(path, stored, reader, dtype, adapt, on_warning)
        in_parts = not isinstance(source, _WholeLayers)
        del stored, base  # what remains of them is in ``compact`` and ``source``
        if dtype is not None:
            source = _CastUnits(source, dtype)
        for layer in fill_layers(compact, selection, source, compensation, exact_down, error):
            mx.eval(compact.layers[layer].parameters(), error.squared_difference)
            mx.eval(error.squared_reference)
            mx.clear_cache()
            on_layer(layer + 1, selection.num_layers)
        mx.eval(compact.parameters())
        return LoadedSubnetwork(
            model=compact,
            requantization_error=error.relative,
            ffn_bytes_read=reader.bytes_read if in_parts else None,
            unit_major=unit_major,
        )


def _open_source(
    path: Path,
    stored: nn.Module,
    reader: PositionedReader,
    dtype: mx.Dtype | None,
    adapt: Callable[[nn.Module], nn.Module] | None,
    on_warning: Callable[[str], None],
) -> tuple[UnitSource, bool]:
    """Return the cheapest way to read units, and whether it is the side file."""
    whole = functools.partial(load_model, path, lazy=True)
    if adapt is not None:
        return _WholeLayers(adapt(whole()[0])), False
    column_dtype = dtype or compute_dtype(stored)
    tensors = stored_tensors(path)
    try:
        layers = [LayerTensors(stored, tensors, layer) for layer in range(len(stored.layers))]
    except CheckpointError:  # stored as another library has it: mlx-lm converts it while loading
        return _WholeLayers(whole()[0]), False
    rows = _StoredRows(layers, reader, column_dtype)
    try:
        side_file = UnitMajorFile.open(path, layers, reader, column_dtype)
    except CheckpointError as error:
        on_warning(f"{error}; reading the checkpoint's own layout instead")
        side_file = None
    return (rows, False) if side_file is None else (_SideFileUnits(side_file, rows), True)


class _StoredRows:
    """Units of a checkpoint as it is: rows of gate and up, down in bounded blocks."""

    def __init__(self, layers: list[LayerTensors], reader: PositionedReader, dtype: mx.Dtype):
        self._layers = layers
        self._reader = reader
        self._dtype = dtype

    def gather(self, layer: int, units: mx.array) -> GatheredUnits:
        blocks = []
        for block in self._down_blocks(self._layers[layer]):
            columns = mx.take(dequantized(block, self._dtype), units, axis=1)
            mx.eval(columns)
            blocks.append(columns)
        return GatheredUnits(self.rows(layer, units), mx.concatenate(blocks))

    def rows(self, layer: int, units: mx.array) -> dict[str, nn.Module]:
        tensors = self._layers[layer]
        kept = np.array(units)
        projections: dict[str, nn.Module] = {
            name: ffn.clone_module(tensors.module[name]) for name in tensors.layout.row_projections
        }
        for part in tensors.row_parts:
            rows = np.concatenate([kept + row * tensors.num_units for row in range(part.rows)])
            content = self._reader.rows(part.tensor, rows)
            array = to_array(content, part.tensor.dtype, part.tensor.shape[1:])
            projections[part.projection][part.part] = array
        return projections

    def down(self, layer: int) -> nn.Module:
        tensors = self._layers[layer]
        return self._down_rows(tensors, 0, tensors.hidden_size)

    def down_product(self, layer: int, activations: mx.array) -> mx.array:
        products = []
        for block in self._down_blocks(self._layers[layer]):
            product = dequantized(block, self._dtype).astype(mx.float32) @ activations
            mx.eval(product)
            products.append(product)
        return mx.concatenate(products)

    def _down_blocks(self, tensors: LayerTensors) -> Iterator[nn.Module]:
        """Yield the down projection as linear layers of a few of its D rows each."""
        row_bytes = sum(
            tensor.num_bytes // tensor.shape[0] for _, tensor in self._down_parts(tensors)
        )
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, tensors.hidden_size, step):
            yield self._down_rows(tensors, start, min(start + step, tensors.hidden_size))

    def _down_rows(self, tensors: LayerTensors, start: int, stop: int) -> nn.Module:
        """Return a few rows of the down projection as a linear layer."""
        block: nn.Module = ffn.clone_module(tensors.down)
        for part, tensor in self._down_parts(tensors):
            content = self._reader.row_range(tensor, start, stop)
            block[part] = to_array(content, tensor.dtype, tensor.shape[1:])
        return block

    def _down_parts(self, tensors: LayerTensors) -> list[tuple[str, StoredTensor]]:
        return [
            (part, tensors.tensor(tensors.layout.down, part))
            for part in ("weight", "scales", "biases")
            if tensors.down.get(part) is not None
        ]


class _SideFileUnits:
    """Units from the side file; what it cannot serve cheaper, from the rows."""

    def __init__(self, side_file: UnitMajorFile, stored: _StoredRows):
        self.gather = side_file.gather
        self.rows = stored.rows
        self.down = stored.down
        self.down_product = stored.down_product


class _WholeLayers(ResidentUnits):
    """Units of a lazily loaded model that nothing else refers to.

    Each layer is read whole and released when the next one is asked for.
    """

    def gather(self, layer: int, units: mx.array) -> GatheredUnits:
        for earlier in range(layer):
            self._ffns[earlier] = nn.Module()
        return super().gather(layer, units)


class _CastUnits:
    """Units of another source as plain weights of a floating type."""

    def __init__(self, source: UnitSource, dtype: mx.Dtype):
        self._source = source
        self._dtype = dtype
        self.down_product = source.down_product

    def gather(self, layer: int, units: mx.array) -> GatheredUnits:
        gathered = self._source.gather(layer, units)
        return GatheredUnits(
            self._cast_all(gathered.row_projections), gathered.columns.astype(self._dtype)
        )

    def rows(self, layer: int, units: mx.array) -> dict[str, nn.Module]:
        return self._cast_all(self._source.rows(layer, units))

    def down(self, layer: int) -> nn.Module:
        return self._cast(self._source.down(layer))

    def _cast_all(self, projections: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return {name: self._cast(linear) for name, linear in projections.items()}

    def _cast(self, linear: nn.Module) -> nn.Module:
        plain = nn.Linear(1, 1, bias=False)
        plain.weight = dequantized(linear, self._dtype).astype(self._dtype)
        if "bias" in linear:
            plain.bias = linear.bias.astype(self._dtype)
        return plain
