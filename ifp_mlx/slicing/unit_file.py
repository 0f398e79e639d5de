"""The unit file of a checkpoint: everything of one unit in one place.

In a checkpoint an FFN unit is one row of gate, one row of up and one *column* of down, so reading a
few units reads all of down. ``ifp/units.safetensors`` holds the same numbers again, unit by unit,
and one unit is one contiguous read. Kinds without columns need no such file.

Format 1. A safetensors file, its header padded so that data begin at a multiple of 4096 bytes.
Metadata: ``format`` = ``ifp-units``, ``format_version`` = ``1``, ``checkpoint`` = fingerprint of
the checkpoint it was made from. Tensor ``layers.N`` is (F, R) U8: record ``i`` is unit ``i``,
padded with zeros to R, a multiple of 64 bytes. A record is, in this order:

* for each part with rows (gate, up; or gate and up stacked in one) each of its ``weight``,
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

from ifp_mlx.errors import ArchitectureError, CheckpointError, ResourceError
from ifp_mlx.slicing.packed_codes import decode_columns, pack_codes, unpack_codes
from ifp_mlx.slicing.stored_units import StoredParts, StoredUnits
from ifp_mlx.storage.arrays import load_arrays
from ifp_mlx.storage.files import atomic_path, require_free_disk
from ifp_mlx.storage.identity import fingerprint
from ifp_mlx.storage.positioned_reads import Bytes, PositionedReader, to_array
from ifp_mlx.storage.tensor_files import StoredTensor, read_header
from ifp_mlx.storage.weights import load_model, stored_tensors
from ifp_mlx.units.kinds import Part
from ifp_mlx.units.modules import is_packed

UNIT_FILE = Path("ifp") / "units.safetensors"
_FORMAT = "ifp-units"
_AGAIN = "run ifp convert MODEL --unit-major again"
_FORMAT_VERSION = "1"
_RECORD_ALIGNMENT = 64
_DATA_ALIGNMENT = 4096


@dataclasses.dataclass(frozen=True)
class _Field:
    """One piece of a record: a unit's rows of one tensor.

    Attributes:
        part: of which it is.
        array: name of the array there.
        tensor: where that is in the checkpoint.
        row_bytes: of each of its rows.
    """

    part: Part
    array: str
    tensor: StoredTensor
    row_bytes: int

    @property
    def num_bytes(self) -> int:
        """What a unit has of it."""
        return self.part.stacked * self.row_bytes


class _RecordLayout:
    """What a record of one layer looks like.

    Args:
        parts: the checkpoint's; their kind has columns.
        layer: index of the decoder layer.
    """

    def __init__(self, parts: StoredParts, layer: int):
        columns = parts.kind.columns
        assert columns is not None
        self.fields = [
            _Field(part, name, tensor, tensor.num_bytes // tensor.shape[0])
            for part in parts.kind.rows
            for name, tensor in parts.tensors(layer, part).items()
        ]
        self.num_units = parts.shape.num_units
        self.down = parts.module(layer, columns)
        self.down_tensors = parts.tensors(layer, columns)
        weight = self.down_tensors["weight"]
        self.hidden_size = weight.shape[0]
        self.column_bytes = weight.num_bytes // self.num_units
        self.column_start = sum(field.num_bytes for field in self.fields)
        used = self.column_start + self.column_bytes
        self.record_bytes = -(-used // _RECORD_ALIGNMENT) * _RECORD_ALIGNMENT

    @property
    def layer_bytes(self) -> int:
        """All records together."""
        return self.num_units * self.record_bytes


def write_unit_file(
    path: Path, *, on_bytes: Callable[[int, int], Any] = lambda done, total: None
) -> Path:
    """Write a checkpoint's unit file, whole or not at all, and return its path.

    One layer's units are in memory at a time.

    Args:
        path: a checkpoint directory, quantized or not.
        on_bytes: called with the bytes written and all there will be, layer by layer.

    Raises:
        ArchitectureError: the units of this family are contiguous as they are.
        CheckpointError: the checkpoint is damaged, or not stored as mlx-lm has it.
        ResourceError: no room on the disk, or another process is writing this file.
    """
    target = path / UNIT_FILE
    layouts = _all_layouts(path)
    header = _make_header(layouts, fingerprint(path))
    total_bytes = len(header) + sum(layout.layer_bytes for layout in layouts)
    require_free_disk(target.parent, total_bytes)
    with _writing(target), atomic_path(target) as temporary, temporary.open("wb") as file:
        file.write(header)
        with PositionedReader() as reader:
            for layout in layouts:
                file.write(_records(layout, reader).reshape(-1).data)
                on_bytes(file.tell(), total_bytes)
    return target


def unit_file_is_current(path: Path) -> bool:
    """Return whether a checkpoint has a unit file made from its present weights.

    Raises:
        ArchitectureError: the units of this family are contiguous as they are.
        CheckpointError: the checkpoint is damaged, or not stored as mlx-lm has it.
    """
    layouts = _all_layouts(path)
    try:
        return _open_records(path, layouts) is not None
    except CheckpointError:
        return False


def _all_layouts(path: Path) -> list[_RecordLayout]:
    model, _ = load_model(path, lazy=True)
    parts = StoredParts(model, stored_tensors(path))
    if parts.kind.columns is None:
        raise ArchitectureError(
            f"{path}: its {parts.kind.label} are contiguous in the checkpoint itself; "
            "there is nothing to prepare"
        )
    return [_RecordLayout(parts, layer) for layer in parts.shape.layers]


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


def _make_header(layouts: list[_RecordLayout], checkpoint: str) -> bytes:
    metadata = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "checkpoint": checkpoint}
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for index, layout in enumerate(layouts):
        end = position + layout.layer_bytes
        entries[f"layers.{index}"] = {
            "dtype": "U8",
            "shape": [layout.num_units, layout.record_bytes],
            "data_offsets": [position, end],
        }
        position = end
    content = json.dumps(entries).encode()
    padded = -(-(8 + len(content)) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT - 8
    return padded.to_bytes(8, "little") + content.ljust(padded)


def _records(layout: _RecordLayout, reader: PositionedReader) -> Bytes:
    records = np.zeros((layout.num_units, layout.record_bytes), dtype=np.uint8)
    start = 0
    for field in layout.fields:
        for matrix in range(field.part.stacked):
            first = matrix * layout.num_units
            records[:, start : start + field.row_bytes] = reader.row_range(
                field.tensor, first, first + layout.num_units
            )
            start += field.row_bytes
    rows = reader.row_range(layout.down_tensors["weight"], 0, layout.hidden_size)  # (D, row bytes)
    records[:, start : start + layout.column_bytes] = _columns(layout.down, rows, layout.num_units)
    return records


def _columns(down: nn.Module, rows: Bytes, num_units: int) -> Bytes:
    """Return (F, column bytes) of (D, row bytes)."""
    if is_packed(down):
        return pack_codes(np.ascontiguousarray(unpack_codes(rows, down.bits).T), down.bits)
    values = rows.reshape(len(rows), num_units, -1)  # (D, F, bytes of a value)
    return np.ascontiguousarray(values.transpose(1, 0, 2)).reshape(num_units, -1)


def _open_records(path: Path, layouts: list[_RecordLayout]) -> list[StoredTensor] | None:
    """Return where the records of each layer are, None if there is no unit file."""
    file = path / UNIT_FILE
    if not file.exists():
        return None
    stored = read_header(file)
    metadata = load_arrays(file)[1]
    if (metadata.get("format"), metadata.get("format_version")) != (_FORMAT, _FORMAT_VERSION):
        raise CheckpointError(f"{file} has another format; {_AGAIN}")
    if metadata.get("checkpoint") != fingerprint(path):
        raise CheckpointError(f"{file} belongs to other weights; {_AGAIN}")
    records = []
    for index, layout in enumerate(layouts):
        record = stored.get(f"layers.{index}")
        shape = (layout.num_units, layout.record_bytes)
        if record is None or record.dtype != "U8" or record.shape != shape:
            raise CheckpointError(f"{file} does not fit the weights; {_AGAIN}")
        records.append(record)
    return records


class UnitFileUnits:
    """The units of a checkpoint, read from its unit file: one read for each run of them.

    Args:
        stored: serves what is cheaper from the checkpoint itself.
        layouts: what a record of each layer looks like, by layer.
        records: where the records of each layer are.
        reader: of both files.
        dtype: the type that packed columns are dequantized to.
    """

    def __init__(
        self,
        stored: StoredUnits,
        layouts: dict[int, _RecordLayout],
        records: dict[int, StoredTensor],
        reader: PositionedReader,
        dtype: mx.Dtype,
    ):
        self.whole = stored.whole
        self._stored = stored
        self._layouts = layouts
        self._records = records
        self._reader = reader
        self._dtype = dtype
        self._latest: tuple[int, Bytes] | None = None  # a layer's parts are taken one by one

    @classmethod
    def open(
        cls,
        path: Path,
        parts: StoredParts,
        stored: StoredUnits,
        reader: PositionedReader,
        dtype: mx.Dtype,
    ) -> "UnitFileUnits | None":
        """Return the units of a checkpoint's unit file, or None if it has none.

        Raises:
            CheckpointError: the file is damaged, of another version or of another checkpoint;
                the checkpoint itself can still be used.
        """
        if parts.kind.columns is None:
            return None
        layouts = {layer: _RecordLayout(parts, layer) for layer in parts.shape.layers}
        records = _open_records(path, list(layouts.values()))
        if records is None:
            return None
        return cls(stored, layouts, dict(zip(layouts, records, strict=True)), reader, dtype)

    def take(self, layer: int, part: Part, units: mx.array) -> dict[str, mx.array]:
        """Return what a part of a layer has of the given units."""
        layout = self._layouts[layer]
        records = self._read(layer, units)
        if part.axis == -1:
            stop = layout.column_start + layout.column_bytes
            return {"weight": self._decode(layout, units, records[:, layout.column_start : stop])}
        arrays, start = {}, 0
        for field in layout.fields:
            stop = start + field.num_bytes
            if field.part == part:
                pieces = records[:, start:stop].reshape(len(records), part.stacked, field.row_bytes)
                # First rows, then second ones.
                rows = pieces.transpose(1, 0, 2).reshape(-1, field.row_bytes)
                arrays[field.array] = to_array(rows, field.tensor.dtype, field.tensor.shape[1:])
            start = stop
        return arrays

    def _read(self, layer: int, units: mx.array) -> Bytes:
        if self._latest is None or self._latest[0] != layer:
            self._latest = None  # two layers at once would be twice the memory
            self._latest = layer, self._reader.rows(self._records[layer], np.array(units))
        return self._latest[1]

    def _decode(self, layout: _RecordLayout, units: mx.array, columns: Bytes) -> mx.array:
        down, weight = layout.down, layout.down_tensors["weight"]
        if not is_packed(down):
            return to_array(columns, weight.dtype, (layout.hidden_size,)).T  # (K, D) -> (D, K)
        packed = to_array(columns, "U32", (columns.shape[1] // 4,))
        groups = units // down.group_size
        factors = {}
        for name, tensor in layout.down_tensors.items():
            if name != "weight":
                content = self._reader.row_range(tensor, 0, tensor.shape[0])
                stored = to_array(content, tensor.dtype, tensor.shape[1:])
                factors[name] = mx.take(stored, groups, axis=1)
        return decode_columns(
            packed,
            factors["scales"],
            factors.get("biases"),
            bits=down.bits,
            mode=down.mode,
            dtype=self._dtype,
        )
