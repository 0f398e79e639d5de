"""Reading parts of stored tensors: the wanted rows and nothing else."""

import itertools
import os
from pathlib import Path
from types import TracebackType

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.tensor_files import StoredTensor

Bytes = npt.NDArray[np.uint8]

# How NumPy reads a dtype, and what MLX then sees in it: NumPy has no bfloat16.
_DTYPES: dict[str, tuple[type[np.generic], mx.Dtype]] = {
    "U8": (np.uint8, mx.uint8),
    "U32": (np.uint32, mx.uint32),
    "F16": (np.uint16, mx.float16),
    "BF16": (np.uint16, mx.bfloat16),
    "F32": (np.float32, mx.float32),
}


class PositionedReader:
    """Reads byte ranges of safetensors files; a context manager that closes them.

    Nothing is mapped: a mapped page counts as memory of the process until the system needs it,
    and a machine that is short of memory is where this matters.

    Attributes:
        bytes_read: since it was made.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "PositionedReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def rows(self, tensor: StoredTensor, rows: npt.NDArray[np.int32]) -> Bytes:
        """Return the given rows of a tensor as (K, row bytes); adjacent rows are one read.

        Args:
            tensor: at least one axis; its rows are along the first.
            rows: (K,) ascending; each is checked against the tensor.

        Raises:
            CheckpointError: a row is outside the tensor, or the file has become shorter.
        """
        if rows.size and not 0 <= rows.min() <= rows.max() < tensor.shape[0]:
            raise CheckpointError(f"{tensor.name} has {tensor.shape[0]} rows; one is asked beyond")
        row_bytes = tensor.num_bytes // tensor.shape[0]
        content = np.empty((rows.size, row_bytes), dtype=np.uint8)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        bounds = [0, *breaks.tolist(), rows.size]
        for start, stop in itertools.pairwise(bounds):
            position = tensor.offset + int(rows[start]) * row_bytes
            self._read_into(tensor.path, content[start:stop].reshape(-1).data, position)
        return content

    def row_range(self, tensor: StoredTensor, start: int, stop: int) -> Bytes:
        """Return rows ``start`` to ``stop`` of a tensor as (stop - start, row bytes): one read."""
        return self.rows(tensor, np.arange(start, stop, dtype=np.int32))

    def _read_into(self, path: Path, buffer: memoryview, position: int) -> None:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        while buffer:
            num_bytes = os.preadv(self._descriptors[path], [buffer], position)
            if num_bytes == 0:
                raise CheckpointError(f"{path} has become shorter; download or convert it again")
            self.bytes_read += num_bytes
            position += num_bytes
            buffer = buffer[num_bytes:]


def to_array(content: Bytes, dtype: str, row_shape: tuple[int, ...]) -> mx.array:
    """Return rows of bytes as an (rows, *row_shape) array of a safetensors dtype. Copies.

    Raises:
        CheckpointError: MLX has no such weights.
    """
    if dtype not in _DTYPES:
        raise CheckpointError(f"FFN weights of dtype {dtype} cannot be read; convert the model")
    read_as, dtype_in_mlx = _DTYPES[dtype]
    values = np.ascontiguousarray(content).view(read_as).reshape(-1, *row_shape)
    return mx.array(values).view(dtype_in_mlx)
