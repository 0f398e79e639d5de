"""Weight changes in two to four bits: small codes times one scale a group.

Fine-tuning moves a weight by a small fraction of its size, so a coarse code of the change costs
little: an error of a tenth of a tenth of the weight.
"""

import dataclasses

import mlx.core as mx

from ifp_mlx.errors import AdapterError

GROUP_SIZE = 64
"""Weights that share a scale; divides every row length of the families in the table."""

_CODES_A_WORD = 8
_SCALE_STEPS = 24


@dataclasses.dataclass(frozen=True)
class DeltaCodes:
    """One matrix of changes.

    Attributes:
        packed: (N / 8, bits) uint8, eight codes in ``bits`` bytes, lowest code in the low bits.
        scales: (N / 64,) float16; a change is (code - (2**bits - 1) / 2) * scale.
        bits: 2, 3 or 4.
    """

    packed: mx.array
    scales: mx.array
    bits: int


def encode_delta(delta: mx.array, bits: int) -> DeltaCodes:
    """Return the codes of a tensor whose size is a multiple of 64. Evaluates.

    Each group's scale is the one of several candidates with the least squared error: cutting off
    a few outliers is cheaper than spreading few codes over them.

    Raises:
        AdapterError: bits are not 2, 3 or 4, or the size does not fit.
    """
    if bits not in (2, 3, 4):
        raise AdapterError(f"weight changes take 2, 3 or 4 bits, not {bits}")
    if delta.size % GROUP_SIZE:
        raise AdapterError(f"{delta.size} weights do not divide into groups of {GROUP_SIZE}")
    groups = delta.astype(mx.float32).reshape(-1, GROUP_SIZE)
    middle = (2**bits - 1) / 2
    widest = mx.abs(groups).max(axis=-1, keepdims=True) / middle
    best_scale = widest
    best_error = mx.full(widest.shape, float("inf"))
    for step in range(_SCALE_STEPS):
        # Stored in half precision, so chosen in half precision.
        scale = (widest * (1.0 - 0.7 * step / _SCALE_STEPS)).astype(mx.float16)
        scale = scale.astype(mx.float32)
        error = (_decoded(_codes(groups, scale, bits), scale, bits) - groups).square()
        error = error.sum(axis=-1, keepdims=True)
        better = error < best_error
        best_scale = mx.where(better, scale, best_scale)
        best_error = mx.where(better, error, best_error)
        mx.eval(best_scale, best_error)
    codes = _codes(groups, best_scale, bits).reshape(-1, _CODES_A_WORD)
    words = (codes << (bits * mx.arange(_CODES_A_WORD, dtype=mx.uint32))).sum(axis=-1)
    octets = (words.astype(mx.uint32)[:, None] >> (8 * mx.arange(bits, dtype=mx.uint32))) & 0xFF
    result = DeltaCodes(octets.astype(mx.uint8), best_scale.reshape(-1).astype(mx.float16), bits)
    mx.eval(result.packed, result.scales)
    return result


def decode_delta(codes: DeltaCodes, shape: tuple[int, ...]) -> mx.array:
    """Return the float32 changes of a tensor of the given shape. Lazy."""
    bits = codes.bits
    octets = codes.packed.astype(mx.uint32)
    words = (octets << (8 * mx.arange(bits, dtype=mx.uint32))).sum(axis=-1).astype(mx.uint32)
    shifts = bits * mx.arange(_CODES_A_WORD, dtype=mx.uint32)
    values = ((words[:, None] >> shifts) & (2**bits - 1)).reshape(-1, GROUP_SIZE)
    scales = codes.scales.astype(mx.float32)[:, None]
    return _decoded(values, scales, bits).reshape(shape)


def _codes(groups: mx.array, scale: mx.array, bits: int) -> mx.array:
    middle = (2**bits - 1) / 2
    levels = mx.round(groups / mx.maximum(scale, 1e-12) + middle)
    return mx.clip(levels, 0, 2**bits - 1).astype(mx.uint32)


def _decoded(codes: mx.array, scale: mx.array, bits: int) -> mx.array:
    centred: mx.array = codes.astype(mx.float32) - (2**bits - 1) / 2
    return centred * scale
