"""GGUF tensors as MLX arrays: packed where MLX has the same format, dequantized otherwise."""

from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from ifp_mlx.convert.gguf_reader import GGUFFile, GGUFTensor
from ifp_mlx.errors import CheckpointError

GROUP_SIZE = 32  # of every packed kind below: llama.cpp's block
_PACKED = {
    Kind.Q4_0: (4, "affine"),
    Kind.Q4_1: (4, "affine"),
    Kind.Q8_0: (8, "affine"),
    Kind.MXFP4: (4, "mxfp4"),
}
_NOT_A_NUMBER = 255  # as the scale of an MXFP4 block


def packing_of(tensor: GGUFTensor) -> dict[str, Any] | None:
    """Return group size, bits and mode if the tensor can stay packed in MLX, else None.

    That can be matrices and stacks of matrices, one for each expert.
    """
    if tensor.kind not in _PACKED or len(tensor.shape) < 2 or not tensor.name.endswith(".weight"):
        return None
    bits, mode = _PACKED[tensor.kind]
    return {"group_size": GROUP_SIZE, "bits": bits, "mode": mode}


def read_packed(file: GGUFFile, tensor: GGUFTensor) -> dict[str, mx.array]:
    """Return a tensor for which there is a ``packing_of``, repacked with exactly the same values.

    Scales and biases are float32: every product of a block's half-precision scale with -8 or
    -128 is representable there, so nothing is rounded.

    Returns:
        ``weight``, (..., rows, columns * bits / 32) uint32, the first value in the lowest bits,
        and ``scales`` and ``biases``, (..., rows, columns / 32): ``w = scales * q + biases``.
        MXFP4 has no biases, and scales of a byte, which is the exponent of 2 plus 127.

    Raises:
        CheckpointError: an MXFP4 block is not a number.
    """
    *rows, columns = tensor.shape
    blocks = file.blocks(tensor).reshape(*rows, columns // GROUP_SIZE, -1)  # (..., groups, bytes)
    if tensor.kind == Kind.Q8_0:
        # Signed to unsigned: q + 128 is q with its top bit flipped.
        packed = blocks[..., 2:] ^ np.uint8(0x80)
    else:
        # Byte j of a block has value j in its low half and value j + 16 in its high half.
        nibbles = blocks[..., -GROUP_SIZE // 2 :]
        values = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
        packed = values[..., 0::2] | (values[..., 1::2] << 4)
    weight = mx.array(np.ascontiguousarray(packed).reshape(*rows, -1).view(np.uint32))
    if tensor.kind == Kind.MXFP4:
        if (blocks[..., 0] == _NOT_A_NUMBER).any():
            raise CheckpointError(
                f"{file.path}: tensor {tensor.name!r} holds values that are not numbers; "
                "fetch the file again"
            )
        return {"weight": weight, "scales": mx.array(blocks[..., 0])}
    scales = _half_at(blocks, 0)
    if tensor.kind == Kind.Q4_1:
        biases = _half_at(blocks, 2)
    else:
        biases = scales * np.float32(-128 if tensor.kind == Kind.Q8_0 else -8)
    return {"weight": weight, "scales": mx.array(scales), "biases": mx.array(biases)}


def read_dense(file: GGUFFile, tensor: GGUFTensor) -> mx.array:
    """Return a tensor as float32, in its own shape.

    Raises:
        CheckpointError: the ``gguf`` package cannot dequantize this type.
    """
    try:
        with np.errstate(all="ignore"):  # of a damaged file; the caller looks at the values
            values = gguf.quants.dequantize(file.blocks(tensor), tensor.kind)
    except NotImplementedError:
        raise CheckpointError(
            f"{file.path}: tensor {tensor.name!r} has the type {tensor.kind.name}, "
            "which cannot be dequantized; convert a Q4, Q5, Q6, Q8, F16 or BF16 file instead"
        ) from None
    return mx.array(np.ascontiguousarray(values, dtype=np.float32)).reshape(tensor.shape)


def _half_at(blocks: np.ndarray, start: int) -> np.ndarray:
    """Return the half-precision number at a byte of each block, as float32."""
    halves = blocks[..., start : start + 2].copy().view(np.float16)[..., 0]
    return halves.astype(np.float32)
