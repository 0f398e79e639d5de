"""Linear layers that were packed before their weights were changed."""

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.units.modules import plain_linear


class ChangedLinear(nn.Linear):
    """A plain layer in place of a packed one that an adapter changed: it is to be packed again.

    Attributes:
        group_size: of the packed layer.
        packed_bytes: what its codes, scales and biases took.
    """

    group_size: int
    packed_bytes: int

    @classmethod
    def of(cls, weight: mx.array, packed: nn.Module) -> "ChangedLinear":
        """Return the layer of a new (out, in) weight, with the bias of the packed layer."""
        layer = cls.__new__(cls)
        layer.__dict__.update(plain_linear(weight).__dict__)
        dict.update(layer, plain_linear(weight, packed.get("bias")))
        layer.group_size = int(packed.group_size)
        parts = (packed.get(name) for name in ("weight", "scales", "biases"))
        layer.packed_bytes = sum(int(part.nbytes) for part in parts if part is not None)
        return layer
