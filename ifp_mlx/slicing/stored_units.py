"""Units of a checkpoint on disk: only the wanted ones are read, straight from its files."""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ifp_mlx.errors import CheckpointError
from ifp_mlx.slicing.compact import rows_of
from ifp_mlx.storage.positioned_reads import PositionedReader, to_array
from ifp_mlx.storage.tensor_files import StoredTensor
from ifp_mlx.units.kinds import Part
from ifp_mlx.units.modules import (
    copy_module,
    dequantized,
    family_of,
    part_of,
    unit_layers,
    unit_shape,
)

BLOCK_BYTES = 16 * 2**20
"""How much of a matrix whose columns are wanted is in memory at once."""


class StoredParts:
    """Where the units of a checkpoint are, tensor by tensor.

    Args:
        model: of the checkpoint, loaded lazily; says how each part is packed.
        tensors: of the checkpoint.

    Attributes:
        kind: of its units.
        shape: how many there are.

    Raises:
        CheckpointError: the checkpoint stores its units in another form than mlx-lm uses, so that
            it cannot be read in parts.
    """

    def __init__(self, model: nn.Module, tensors: dict[str, StoredTensor]):
        self._family = family_of(model)
        self.kind = self._family.kind
        self.shape = unit_shape(model)
        self._layers = unit_layers(model)
        self._tensors = {
            (layer, part.path): self._find(layer, part, tensors)
            for layer in self.shape.layers
            for part in self.kind.parts
        }

    def module(self, layer: int, part: Part) -> nn.Module:
        """Return the module of a part; its arrays are not to be evaluated."""
        return part_of(self._layers[layer], part)

    def tensors(self, layer: int, part: Part) -> dict[str, StoredTensor]:
        """Return where the arrays of a part are that are indexed by unit, by array name."""
        return self._tensors[layer, part.path]

    def _find(
        self, layer: int, part: Part, tensors: dict[str, StoredTensor]
    ) -> dict[str, StoredTensor]:
        module = part_of(self._layers[layer], part)
        found = {}
        for array in part.arrays:
            if module.get(array) is None or (part.axis == -1 and array == "bias"):
                continue  # the bias of a part with columns belongs to no unit
            name = self._family.array_name(layer, part, array)
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != module[array].shape:
                raise CheckpointError(
                    f"{name} is not stored as mlx-lm has it; run ifp convert on this checkpoint"
                )
            found[array] = tensor
        return found


class StoredUnits:
    """The units of a checkpoint as it is: rows one by one, columns from bounded blocks.

    Args:
        parts: where they are.
        reader: of the files.
        dtype: the type that packed columns are dequantized to.
    """

    def __init__(self, parts: StoredParts, reader: PositionedReader, dtype: mx.Dtype):
        self._parts = parts
        self._reader = reader
        self._dtype = dtype

    def take(self, layer: int, part: Part, units: mx.array) -> dict[str, mx.array]:
        """Return what a part of a layer has of the given units. Evaluates columns."""
        if part.axis == -1:
            return {"weight": self._columns(layer, part, units)}
        rows = np.array(rows_of(part, units, self._parts.shape.num_units))
        return {
            name: to_array(self._reader.rows(tensor, rows), tensor.dtype, tensor.shape[1:])
            for name, tensor in self._parts.tensors(layer, part).items()
        }

    def whole(self, layer: int, part: Part) -> nn.Module:
        """Return the module of a part, read from the disk."""
        tensors = self._parts.tensors(layer, part)
        return self._block(layer, part, 0, next(iter(tensors.values())).shape[0])

    def _columns(self, layer: int, part: Part, units: mx.array) -> mx.array:
        blocks = []
        for block in self._blocks(layer, part):
            blocks.append(mx.take(dequantized(block, self._dtype), units, axis=1))
            mx.eval(blocks[-1])
        return mx.concatenate(blocks)

    def _blocks(self, layer: int, part: Part) -> Iterator[nn.Module]:
        """Yield a part as linear layers of a few of its D rows each."""
        tensors = self._parts.tensors(layer, part).values()
        num_rows = next(iter(tensors)).shape[0]
        row_bytes = sum(tensor.num_bytes // num_rows for tensor in tensors)
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, num_rows, step):
            yield self._block(layer, part, start, min(start + step, num_rows))

    def _block(self, layer: int, part: Part, start: int, stop: int) -> nn.Module:
        block = copy_module(self._parts.module(layer, part))
        for name, tensor in self._parts.tensors(layer, part).items():
            content = self._reader.row_range(tensor, start, stop)
            block[name] = to_array(content, tensor.dtype, tensor.shape[1:])
        return block
