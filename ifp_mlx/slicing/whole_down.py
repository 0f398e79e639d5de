"""A packed down projection that stays whole, for sub-networks that must be exact.

The groups of a packed down projection run along the units: each row of it has one scale for 32 or
more neighbouring units. Kept units cannot be cut out of it packed, because what is left of a group
would need its scale once a unit. Whole, it is exact as it is and often smaller than the kept
columns as plain weights.
"""

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.units.modules import input_dims, is_packed


class WholeDown(nn.Module):
    """A packed down projection of all F units behind the activations of K of them.

    Args:
        down: the quantized layer; it may be shared between sub-networks.
        units: (K,) int32, the kept units.
    """

    def __init__(self, down: nn.Module, units: mx.array):
        super().__init__()
        self.down = down
        self._units = units

    def __call__(self, activations: mx.array) -> mx.array:
        """Map (B, T, K) activations of the kept units to (B, T, D)."""
        num_units = input_dims(self.down)  # F
        everything = mx.zeros((*activations.shape[:-1], num_units), activations.dtype)
        everything[..., self._units] = activations  # (B, T, K) -> (B, T, F)
        return self.down(everything)  # type: ignore[no-any-return]

    @property
    def units(self) -> mx.array:
        """The (K,) kept units."""
        return self._units


def is_smaller_whole(down: nn.Module, num_kept_units: int, dtype: mx.Dtype) -> bool:
    """Return whether a down projection is packed and smaller than K plain columns in ``dtype``."""
    if not is_packed(down):
        return False
    plain_bytes = int(down.weight.shape[0]) * num_kept_units * int(dtype.size)
    return packed_bytes(down) < plain_bytes


def packed_bytes(linear: nn.Module) -> int:
    """Return the size of a quantized layer's codes, scales and biases, without its bias."""
    parts = (linear.get(name) for name in ("weight", "scales", "biases"))
    return sum(int(part.nbytes) for part in parts if part is not None)
