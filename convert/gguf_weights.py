"""GGUF tensors as MLX arrays: packed where MLX has the same format, dequantized otherwise."""

import dataclasses

import gguf
import mlx.core as mx
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from ifp_mlx.convert.gguf_reader import GGUFFile, GGUFTensor
from ifp_mlx.errors import CheckpointError

GROUP_SIZE = 32  # of every packed kind below: llama.cpp's block
_PACKED_BITS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q8_0: 8}


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix in MLX's affine quantization, group size 32: ``w = scales * q + biases``.

    Attributes:
        weight: (rows, columns * bits / 32) uint32, the first value in the lowest bits.
        scales: (rows, columns / 32) float32.
        biases: (rows, columns / 32) float32.
        bits: 4 or 8.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    bits: int


def packed_bits(tensor: GGUFTensor) -> int | None:
    """Return the bits a value takes if the tensor can stay packed in MLX, else None."""
    return _PACKED_BITS.get(tensor.kind) if len(tensor.shape) == 2 else None


def read_packed(file: GGUFFile, tensor: GGUFTensor) -> PackedMatrix:
    """Return a Q4_0, Q4_1 or Q8_0 matrix repacked for MLX, with exactly the same values.

    Scales and biases are float32: every product of a block's half-precision scale with -8 or
    -128 is representable there, so nothing is rounded.
    """
    rows, columns = tensor.shape
    blocks = file.blocks(tensor).reshape(rows, columns // GROUP_SIZE, -1)  # (rows, groups, bytes)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    if tensor.kind == Kind.Q8_0:
        # Signed to unsigned: q + 128 is q with its top bit flipped.
        packed = blocks[..., 2:] ^ np.uint8(0x80)
        biases = scales * np.float32(-128)
    else:
        # Byte j of a block has value j in its low half and value j + 16 in its high half.
        nibbles = blocks[..., -GROUP_SIZE // 2 :]
        values = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
        packed = values[..., 0::2] | (values[..., 1::2] << 4)
        if tensor.kind == Kind.Q4_1:
            biases = blocks[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float32)
        else:
            biases = scales * np.float32(-8)
    words = np.ascontiguousarray(packed).reshape(rows, -1).view(np.uint32)
    return PackedMatrix(
        mx.array(words), mx.array(scales), mx.array(biases), _PACKED_BITS[tensor.kind]
    )


def read_dense(file: GGUFFile, tensor: GGUFTensor) -> mx.array:
    """Return a tensor as float32, in its own shape.

    Raises:
        CheckpointError: the ``gguf`` package cannot dequantize this type.
    """
    try:
        values = gguf.quants.dequantize(file.blocks(tensor), tensor.kind)
    except NotImplementedError:
        raise CheckpointError(
            f"{file.path}: tensor {tensor.name!r} has the type {tensor.kind.name}, "
            "which cannot be dequantized; convert a Q4, Q5, Q6, Q8, F16 or BF16 file instead"
        ) from None
    return mx.array(np.ascontiguousarray(values, dtype=np.float32)).reshape(tensor.shape)
