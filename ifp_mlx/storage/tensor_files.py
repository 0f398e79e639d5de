"""The header of a safetensors file, checked before anything else opens the file.

MLX trusts headers. This reader does not: a length beyond the file, overlapping ranges, an
unknown dtype, a shape that disagrees with its bytes or a name that looks like a path gives one
``CheckpointError``, and nothing is allocated from a length that has not been checked.

Source: the safetensors format description: 8 bytes little-endian header length, JSON header,
then tensor data without holes.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.misnamed import what_it_is

_MAX_HEADER_BYTES = 100_000_000  # as in the reference implementation
_MAX_RANK = 8
_MAX_NAME_LENGTH = 512
# The dtypes that MLX reads -> bytes a value.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
    "F16": 2, "BF16": 2, "F32": 4,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is in a safetensors file.

    Attributes:
        dtype: as the file names it, such as ``BF16``.
        offset: bytes from the start of the file.
        num_bytes: size in the file.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in the order of their data.

    Raises:
        CheckpointError: the file cannot be read, is truncated or its header is not valid.
    """
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            beginning = file.read(64)
            if (problem := what_it_is(path, beginning)) is not None:
                raise CheckpointError(f"{path} {problem}")
            header_bytes = int.from_bytes(beginning[:8], "little")
            file.seek(8)
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, _MAX_HEADER_BYTES):
                raise _damaged(path, f"its header length {header_bytes} does not fit the file")
            content = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(content.decode("utf-8"), object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a table of tensors")
    metadata = header.pop("__metadata__", None) or {}  # mlx writes null when there are none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata are not strings")
    start = 8 + header_bytes
    tensors = [_stored_tensor(path, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            how = "overlaps" if tensor.offset < position else "leaves a hole after"
            raise _damaged(path, f"tensor {tensor.name!r} {how} the one before it")
        position += tensor.num_bytes
    if position != file_bytes:
        raise _damaged(
            path, f"its tensors take {position - start} bytes, it has {file_bytes - start} for them"
        )
    return {tensor.name: tensor for tensor in tensors}


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {reason}; download or convert it again")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("the same key twice")
    return table


def _stored_tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    shown = repr(name[:80])
    if not name or len(name) > _MAX_NAME_LENGTH or any(part in name for part in ("/", "\\", "..")):
        raise _damaged(path, f"{shown} is no tensor name")
    if not name.isprintable():
        raise _damaged(path, f"{shown} is no tensor name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of tensor {shown} is not valid")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{path}: tensor {shown} has the dtype {str(dtype)[:20]!r}, which mlx does not read; "
            f"get or save the model in one of these: {', '.join(ITEM_BYTES)}"
        )
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise _damaged(path, f"tensor {shown} has the shape {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {shown} has the offsets {str(offsets)[:80]}")
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise _damaged(
            path,
            f"tensor {shown} of shape {str(shape)[:80]} and dtype {dtype} does not take "
            f"{str(offsets[1] - offsets[0])[:24]} bytes",
        )
    return StoredTensor(name, path, dtype, tuple(shape), start + offsets[0], num_bytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        for value in values
    )
