"""The integer codes inside packed quantized weights, and back.

MLX packs the codes of a row one after the other, lowest bits first, whatever their width: 2, 3,
4, 5, 6 or 8 bits. That is a little-endian bit stream.
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

_E4M3_ONE = 0x38  # sign 0, exponent 7 - 7, mantissa 0
_E8M0_ONE = 127  # the exponent's bias


def unpack_codes(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Return (R, N) codes of (R, N * bits / 8) packed bytes."""
    if bits == 8:
        return packed
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    return np.packbits(stream.reshape(len(packed), -1, bits), axis=2, bitorder="little")[..., 0]


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Return (R, N * bits / 8) packed bytes of (R, N) codes; N * bits must be a multiple of 8."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    stream = np.unpackbits(codes[..., None], axis=2, count=bits, bitorder="little")
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little")


def decode_columns(
    packed: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    bits: int,
    mode: str,
    dtype: mx.Dtype,
) -> mx.array:
    """Return the (D, K) values of columns whose codes are packed column by column. Lazy.

    Args:
        packed: (K, D * bits / 32) uint32, one column of the weight a row.
        scales: (D, K) the scale of each value, as quantized weights store it.
        biases: (D, K) the same for biases; None in modes without.
        bits: of a code.
        mode: of ``mx.quantize``.
        dtype: the type to compute in and to return.
    """
    num_columns, num_rows = packed.shape[0], packed.shape[1] * 32 // bits
    group_size = 16 if mode == "nvfp4" else 32
    groups = (num_columns, num_rows // group_size)
    # With scales of one, dequantizing gives what a code stands for.
    if biases is not None:  # affine
        ones, zeros = mx.ones(groups, dtype), mx.zeros(groups, dtype)
        codes = mx.dequantize(packed, ones, zeros, group_size=group_size, bits=bits)
        return codes.T * scales.astype(dtype) + biases.astype(dtype)
    one = _E4M3_ONE if mode == "nvfp4" else _E8M0_ONE
    ones = mx.full(groups, one, dtype=mx.uint8)
    codes = mx.dequantize(packed, ones, group_size=group_size, bits=bits, mode=mode)
    if mode == "nvfp4":
        factors = mx.from_fp8(scales, mx.float32)
    else:
        factors = mx.power(2.0, scales.astype(mx.float32) - _E8M0_ONE)
    return (codes.T.astype(mx.float32) * factors).astype(dtype)
