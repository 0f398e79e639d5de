"""A GGUF file, or all parts of one, as checked metadata and tensors.

Written from the format's description: magic, version, counts, key-value pairs, tensor table,
then tensor data. Every length is compared with what is left of the file before anything is
allocated, so a damaged or hostile file gives one ``CheckpointError``.
"""

import dataclasses
import math
import mmap
import re
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.misnamed import what_it_is
from ifp_mlx.storage.weight_files import named

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_NAME_LENGTH = 256
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # of gguf-split; each part is a GGUF file
_PIECE = re.compile(r"part|split|\.\d{2,3}$|-[a-z]{2}$")  # of split(1); only the first is one
# Value type in the file -> little-endian struct format. 7 is a boolean in one byte.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor is in the file.

    Attributes:
        shape: rows first, as NumPy and MLX write it; the file has it reversed.
        kind: how the numbers are stored, such as ``Q4_1``.
        offset: bytes from the start of the file.
        num_bytes: size in the file.
        data: the mapped file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int
    data: mmap.mmap = dataclasses.field(repr=False, compare=False)

    def split(self) -> list["GGUFTensor"]:
        """Return the tensors of one axis less that lie one after the other in this one."""
        num_bytes = self.num_bytes // self.shape[0]
        return [
            dataclasses.replace(
                self,
                shape=self.shape[1:],
                offset=self.offset + index * num_bytes,
                num_bytes=num_bytes,
            )
            for index in range(self.shape[0])
        ]


class GGUFFile:
    """An open GGUF file: ``metadata`` by key, ``tensors`` by name.

    Tensor data stay on disk until ``blocks`` asks for them. Of a model in parts, each may be named;
    all are read.

    Raises:
        CheckpointError: the file is not GGUF version 2 or 3, is truncated or contradicts itself,
            or parts are missing.
    """

    def __init__(self, path: Path):
        self.path = path
        parts = [_Part(part) for part in _part_paths(path)]
        self.metadata = parts[0].metadata
        self.tensors: dict[str, GGUFTensor] = {}
        for number, part in enumerate(parts):
            said = (part.metadata.get("split.no", number), part.metadata.get("split.count"))
            if said[0] != number or said[1] not in (None, 0, len(parts)):
                raise CheckpointError(
                    f"{part.path} says that it is part {said[0]} (from 0) of {said[1]}; put all "
                    "parts into one folder, under the names that they were published with"
                )
            twice = next((name for name in part.tensors if name in self.tensors), None)
            if twice is not None:
                raise CheckpointError(f"{part.path}: tensor {twice!r} is in another part, too")
            self.tensors |= part.tensors
        count = self.metadata.get("split.tensors.count", len(self.tensors))
        if count != len(self.tensors):
            raise CheckpointError(
                f"{path} announces {count} tensors, {len(parts)} parts have {len(self.tensors)}; "
                "fetch all parts again"
            )

    def blocks(self, tensor: GGUFTensor) -> np.ndarray:
        """Return a tensor's bytes, (rows, bytes a row) uint8, as a view of the mapped file."""
        flat = np.frombuffer(tensor.data, np.uint8, tensor.num_bytes, tensor.offset)
        return flat.reshape(math.prod(tensor.shape[:-1]), -1)


def _part_paths(path: Path) -> list[Path]:
    """Return the files that a model is in, in order, by their names.

    Raises:
        CheckpointError: some are missing.
    """
    match = _PART.fullmatch(path.name)
    count = int(match[3]) if match is not None else 1
    if match is None or not 1 <= int(match[2]) <= count:
        return [path]
    paths = [path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}.gguf") for n in range(1, count + 1)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        raise CheckpointError(
            f"{path} is one of {count} parts; {named(missing)} must lie beside it: fetch all parts "
            "into one folder"
        )
    return paths


class _Part:
    """One file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                problem = what_it_is(path, file.read(64))
                if problem is not None and not problem.startswith("is a GGUF"):
                    raise CheckpointError(f"{path} {problem}")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        self._position = 0
        if self._take(4) != _MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file{self._hint}")
        version = self._scalar("I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{path} is GGUF version {version}; 2 and 3 are read (big-endian files are not)"
            )
        num_tensors, num_pairs = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        # The shortest pair takes 13 bytes, the shortest tensor entry 24.
        for _ in range(self._checked_count(num_pairs, 13, "metadata entries")):
            key = self._name()
            self.metadata[key] = self._value(self._scalar("I"), key)
        self.tensors = self._tensor_table(self._checked_count(num_tensors, 24, "tensors"))

    @property
    def _hint(self) -> str:
        is_piece = _PIECE.search(self.path.name) is not None
        return "; join the pieces of a file that was cut first (cat)" if is_piece else ""

    def _fail(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged: {reason}; fetch the file again{self._hint}"
        )

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self._data) - self._position:
            raise self._fail(f"it ends in the header at byte {len(self._data)}")
        start, self._position = self._position, self._position + num_bytes
        return self._data[start : self._position]

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _checked_count(self, count: int, least_bytes: int, what: str) -> int:
        if count * least_bytes > len(self._data) - self._position:
            raise self._fail(f"it announces {count} {what}, more than fit into the file")
        return count

    def _string(self) -> str:
        return self._take(self._checked_count(self._scalar("Q"), 1, "characters")).decode(
            "utf-8", errors="replace"
        )

    def _name(self) -> str:
        name = self._string()
        if len(name) > _MAX_NAME_LENGTH or not name.isprintable():
            raise self._fail(f"{name!r:.60} is no name")
        return name

    def _value(self, value_type: int, key: str) -> Any:
        if value_type == _STRING:
            return self._string()
        if value_type in _SCALARS:
            return self._scalar(_SCALARS[value_type])
        if value_type != _ARRAY:
            raise self._fail(f"{key} has the unknown value type {value_type}")
        item_type, count = self._scalar("I"), self._scalar("Q")
        if item_type == _STRING:
            return [self._string() for _ in range(self._checked_count(count, 8, "strings"))]
        if item_type not in _SCALARS:
            raise self._fail(f"{key} is an array of the unknown type {item_type}")
        code = _SCALARS[item_type]
        size = struct.calcsize(code)
        content = self._take(self._checked_count(count, size, "numbers") * size)
        return list(struct.unpack(f"<{count}{code}", content))

    def _tensor_table(self, count: int) -> dict[str, GGUFTensor]:
        entries = []
        for _ in range(count):
            name, rank = self._name(), self._scalar("I")
            if not 1 <= rank <= _MAX_DIMENSIONS:
                raise self._fail(f"tensor {name!r} has {rank} dimensions")
            shape = tuple(self._scalar("Q") for _ in range(rank))[::-1]
            entries.append((name, shape, self._scalar("I"), self._scalar("Q")))
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._fail(f"its alignment is {alignment!r}")
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind_number, offset in entries:
            if name in tensors:
                raise self._fail(f"tensor {name!r} is there twice")
            tensors[name] = self._tensor(name, shape, kind_number, start + offset)
        self._check_overlaps(tensors)
        return tensors

    def _check_overlaps(self, tensors: dict[str, GGUFTensor]) -> None:
        # A writer that reserves too little for a tensor lets its end be read from the next one.
        ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
        for (name, tensor), (next_name, following) in pairwise(ordered):
            if tensor.offset + tensor.num_bytes > following.offset:
                raise CheckpointError(
                    f"{self.path}: tensors {name!r} and {next_name!r} overlap, so the file was "
                    "written wrongly; get another version of this model"
                )

    def _tensor(
        self, name: str, shape: tuple[int, ...], kind_number: int, offset: int
    ) -> GGUFTensor:
        try:
            kind = GGMLQuantizationType(kind_number)
            block_size, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self._fail(f"tensor {name!r} has the unknown type {kind_number}") from None
        if min(shape) < 1 or shape[-1] % block_size:
            raise self._fail(f"tensor {name!r} of type {kind.name} has the shape {shape}")
        num_bytes = math.prod(shape) // block_size * block_bytes
        if offset + num_bytes > len(self._data):
            raise self._fail(f"tensor {name!r} ends after the end of the file")
        return GGUFTensor(name, shape, kind, offset, num_bytes, self._data)
