"""The unit-major side file of a checkpoint: everything of one FFN unit in one place.

In a checkpoint a unit is one row of gate, one row of up and one *column* of down, so reading a
few units reads all of down. The side file ``ifp/units.safetensors`` holds the same numbers again,
unit by unit, and one unit is one contiguous read.

Format 1. A safetensors file, its header padded so that data begin at a multiple of 4096 bytes.
Metadata: ``format`` = ``ifp-units``, ``format_version`` = ``1``, ``checkpoint`` = fingerprint of
the checkpoint it was made from. Tensor ``layers.N`` is (F, R) U8: record ``i`` is unit ``i``,
padded with zeros to R, a multiple of 64 bytes. A record is, in this order:

* for each row projection (gate, up; or gate and up stacked in one) each of its ``weight``,
  ``scales``, ``biases``, ``bias`` that exist, the bytes of the unit's row as the checkpoint has
  them, two rows where gate and up are stacked: row ``i``, then row ``F + i``;
* the unit's column of down: D values of the stored type or, where down is quantized, D codes
  packed as MLX packs a row. Their scales belong to a row of down and a group of units, not to one
  unit; they are small and are read from the checkpoint.

Nothing is rounded: the file holds the checkpoint's own numbers.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ifp_mlx.errors import CheckpointError, ResourceError
from ifp_mlx.slicing.compact import GatheredUnits
from ifp_mlx.slicing.packed_codes import decode_columns, pack_codes, unpack_codes
from ifp_mlx.storage.arrays import load_arrays
from ifp_mlx.storage.checkpoint import fingerprint, load_model, stored_tensors
from ifp_mlx.storage.files import atomic_path, require_free_disk
from ifp_mlx.storage.positioned_reads import Bytes, PositionedReader, to_array
from ifp_mlx.storage.tensor_files import StoredTensor, read_header
from ifp_mlx.units import ffn

SIDE_FILE = Path("ifp") / "units.safetensors"
_FORMAT = "ifp-units"
_FORMAT_VERSION = "1"
_RECORD_ALIGNMENT = 64
_DATA_ALIGNMENT = 4096
_ROW_PARTS = ("weight", "scales", "biases", "bias")


@dataclasses.dataclass(frozen=True)
class _RowPart:
    """One piece of a record: the unit's rows of one tensor.

    Attributes:
        projection: name of the linear layer.
        part: name of its array.
        tensor: where it is in the checkpoint.
        rows: of a unit: 2 where gate and up are stacked, else 1.
        row_bytes: of each.
    """

    projection: str
    part: str
    tensor: StoredTensor
    rows: int
    row_bytes: int


class LayerTensors:
    """Where one layer's FFN is in a checkpoint, and what a record of it looks like.

    Args:
        model: loaded lazily; says how each projection is quantized.
        tensors: of the checkpoint.
        layer: which layer.

    Raises:
        CheckpointError: the checkpoint stores this layer in another form than mlx-lm uses, so
            that it cannot be read in parts.
    """

    def __init__(self, model: nn.Module, tensors: dict[str, StoredTensor], layer: int):
        self.layout = ffn.ffn_layout(model.args.model_type)
        self.module = ffn.ffn_modules(model)[layer]
        self.num_units = ffn.num_units(model)
        self._prefix = f"{self.layout.layers_path}.{layer}.{self.layout.ffn}"
        self._tensors = tensors
        self.row_parts: list[_RowPart] = []
        rows = 2 if self.layout.fused else 1
        for projection in self.layout.row_projections:
            for part in _ROW_PARTS:
                if self.module[projection].get(part) is not None:
                    tensor = self.tensor(projection, part)
                    row_bytes = tensor.num_bytes // tensor.shape[0]
                    self.row_parts.append(_RowPart(projection, part, tensor, rows, row_bytes))
        self.down = self.module[self.layout.down]
        weight = self.tensor(self.layout.down, "weight")
        self.hidden_size = weight.shape[0]
        self.column_bytes = weight.num_bytes // self.num_units
        used = sum(part.rows * part.row_bytes for part in self.row_parts) + self.column_bytes
        self.record_bytes = -(-used // _RECORD_ALIGNMENT) * _RECORD_ALIGNMENT

    def tensor(self, projection: str, part: str) -> StoredTensor:
        """Return where an array of a projection is stored, if it is stored as mlx-lm has it."""
        name = f"{self._prefix}.{projection}.{part}"
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != self.module[projection][part].shape:
            raise CheckpointError(
                f"{name} is not stored as mlx-lm has it; run ifp convert on this checkpoint"
            )
        return tensor


def write_side_file(
    path: Path, *, on_bytes: Callable[[int, int], Any] = lambda done, total: None
) -> Path:
    """Write a checkpoint's side file, whole or not at all, and return its path.

    One layer's FFN is in memory at a time.

    Args:
        path: a checkpoint directory, quantized or not.
        on_bytes: called with the bytes written and all there will be, layer by layer.

    Raises:
        CheckpointError: the checkpoint is damaged, or not stored as mlx-lm has it.
        ResourceError: no room on the disk, or another process is writing this file.
    """
    target = path / SIDE_FILE
    model, _ = load_model(path, lazy=True)
    layers = _all_layers(path, model)
    header = _make_header(layers, fingerprint(path))
    total_bytes = len(header) + sum(layer.num_units * layer.record_bytes for layer in layers)
    require_free_disk(target.parent, total_bytes)
    with _writing(target), atomic_path(target) as temporary, temporary.open("wb") as file:
        file.write(header)
        with PositionedReader() as reader:
            for layer in layers:
                file.write(_records(layer, reader).reshape(-1).data)
                on_bytes(file.tell(), total_bytes)
    return target


def side_file_is_current(path: Path) -> bool:
    """Return whether a checkpoint has a side file made from its present weights.

    Raises:
        CheckpointError: the checkpoint is damaged, or not stored as mlx-lm has it.
    """
    model, _ = load_model(path, lazy=True)
    layers = _all_layers(path, model)
    try:
        with PositionedReader() as reader:
            return UnitMajorFile.open(path, layers, reader, mx.float32) is not None
    except CheckpointError:
        return False


def _all_layers(path: Path, model: nn.Module) -> list[LayerTensors]:
    tensors = stored_tensors(path)
    return [LayerTensors(model, tensors, layer) for layer in range(len(model.layers))]


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Keep other processes from writing the same file, and remove what killed ones left."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(target.parent / ".units.lock", timeout=0)
        with lock:
            for stale in target.parent.glob(f".{target.stem}.*{target.suffix}"):
                stale.unlink()
            yield
    except filelock.Timeout as error:
        raise ResourceError(f"another process is writing {target}; wait for it") from error
    except OSError as error:
        raise ResourceError(f"cannot write {target}: {error.strerror or error}") from error


def _make_header(layers: list[LayerTensors], checkpoint: str) -> bytes:
    metadata = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "checkpoint": checkpoint}
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for index, layer in enumerate(layers):
        end = position + layer.num_units * layer.record_bytes
        entries[f"layers.{index}"] = {
            "dtype": "U8",
            "shape": [layer.num_units, layer.record_bytes],
            "data_offsets": [position, end],
        }
        position = end
    content = json.dumps(entries).encode()
    padded = -(-(8 + len(content)) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT - 8
    return padded.to_bytes(8, "little") + content.ljust(padded)


def _records(layer: LayerTensors, reader: PositionedReader) -> Bytes:
    records = np.zeros((layer.num_units, layer.record_bytes), dtype=np.uint8)
    start = 0
    for part in layer.row_parts:
        for row in range(part.rows):
            first = row * layer.num_units
            records[:, start : start + part.row_bytes] = reader.row_range(
                part.tensor, first, first + layer.num_units
            )
            start += part.row_bytes
    weight = layer.tensor(layer.layout.down, "weight")
    rows = reader.row_range(weight, 0, layer.hidden_size)  # (D, row bytes)
    records[:, start : start + layer.column_bytes] = _columns(layer.down, rows, layer.num_units)
    return records


def _columns(down: nn.Module, rows: Bytes, num_units: int) -> Bytes:
    """Return (F, column bytes) of (D, row bytes)."""
    if isinstance(down, nn.QuantizedLinear):
        return pack_codes(np.ascontiguousarray(unpack_codes(rows, down.bits).T), down.bits)
    values = rows.reshape(len(rows), num_units, -1)  # (D, F, bytes of a value)
    return np.ascontiguousarray(values.transpose(1, 0, 2)).reshape(num_units, -1)


class UnitMajorFile:
    """An opened side file.

    Args:
        layers: the checkpoint's layers.
        records: where each layer's records are.
        reader: reads both files.
        dtype: the type that quantized columns are dequantized to.
    """

    def __init__(
        self,
        layers: list[LayerTensors],
        records: list[StoredTensor],
        reader: PositionedReader,
        dtype: mx.Dtype,
    ):
        self._layers = layers
        self._records = records
        self._reader = reader
        self._dtype = dtype

    @classmethod
    def open(
        cls, path: Path, layers: list[LayerTensors], reader: PositionedReader, dtype: mx.Dtype
    ) -> "UnitMajorFile | None":
        """Return a checkpoint's side file, or None if it has none.

        Raises:
            CheckpointError: the file is damaged, of another version or of another checkpoint;
                the checkpoint itself can still be used.
        """
        file = path / SIDE_FILE
        if not file.exists():
            return None
        stored = read_header(file)
        metadata = load_arrays(file)[1]
        if (metadata.get("format"), metadata.get("format_version")) != (_FORMAT, _FORMAT_VERSION):
            raise CheckpointError(f"{file} has another format; run ifp prepare again")
        if metadata.get("checkpoint") != fingerprint(path):
            raise CheckpointError(f"{file} belongs to other weights; run ifp prepare again")
        records = [stored.get(f"layers.{index}") for index in range(len(layers))]
        for layer, record in zip(layers, records, strict=True):
            shape = (layer.num_units, layer.record_bytes)
            if record is None or record.dtype != "U8" or record.shape != shape:
                raise CheckpointError(f"{file} does not fit the weights; run ifp prepare again")
        return cls(layers, [record for record in records if record], reader, dtype)

    def gather(self, index: int, units: mx.array) -> GatheredUnits:
        """Return the given (K,) ascending units of a layer: one read for each run of them."""
        layer = self._layers[index]
        records = self._reader.rows(self._records[index], np.array(units))
        projections: dict[str, nn.Module] = {
            name: ffn.clone_module(layer.module[name]) for name in layer.layout.row_projections
        }
        start = 0
        for part in layer.row_parts:
            stop = start + part.rows * part.row_bytes
            pieces = records[:, start:stop].reshape(len(records), part.rows, part.row_bytes)
            rows = pieces.transpose(1, 0, 2).reshape(-1, part.row_bytes)  # first rows, then second
            array = to_array(rows, part.tensor.dtype, part.tensor.shape[1:])
            projections[part.projection][part.part] = array
            start = stop
        return GatheredUnits(
            projections, self._decode(layer, units, records[:, start : start + layer.column_bytes])
        )

    def _decode(self, layer: LayerTensors, units: mx.array, columns: Bytes) -> mx.array:
        down = layer.down
        if not isinstance(down, nn.QuantizedLinear):
            dtype = layer.tensor(layer.layout.down, "weight").dtype
            return to_array(columns, dtype, (layer.hidden_size,)).T  # (K, D) -> (D, K)
        packed = to_array(columns, "U32", (columns.shape[1] // 4,))
        groups = units // down.group_size
        factors = {}
        for part in ("scales", "biases"):
            if down.get(part) is not None:
                tensor = layer.tensor(layer.layout.down, part)
                content = self._reader.row_range(tensor, 0, tensor.shape[0])
                factors[part] = mx.take(
                    to_array(content, tensor.dtype, tensor.shape[1:]), groups, axis=1
                )
        return decode_columns(
            packed,
            factors["scales"],
            factors.get("biases"),
            bits=down.bits,
            mode=down.mode,
            dtype=self._dtype,
        )
