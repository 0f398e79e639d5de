"""Packing again what cannot stay packed as it was, so that no sub-network outgrows its source.

That is what an adapter changed, and columns: kept ones cut across the quantization groups of their
matrix. At 8 bits the second rounding is far below the first (docs/memory.md). Where a sub-network
would then be larger than the model that it comes from, groups are longer or bits fewer.
"""

import dataclasses
from collections.abc import Iterator
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.units.changed_linear import ChangedLinear
from ifp_mlx.units.modules import (
    clone_module,
    compute_dtype,
    dequantized,
    family_of,
    input_dims,
    is_packed,
    leaf_modules,
    module_at,
    part_of,
    plain_linear,
    stored_bytes,
    unit_layers,
    unit_shape,
)

MOST_BITS = 8
_FEWER_BITS = (6, 5, 4)
_GROUP_SIZES = (64, 32)
_LONG_GROUP = 64


@dataclasses.dataclass(frozen=True)
class Repacking:
    """How weights are packed again.

    Attributes:
        bits: of each weight.
        least_group: groups are as long as they were, or this long if they were shorter.
    """

    bits: int = MOST_BITS
    least_group: int = 32

    def group_size(self, packed_in: int, row_length: int) -> int | None:
        """Return how many weights share a scale; None where no group divides the rows.

        Args:
            packed_in: what groups had before.
            row_length: of what is packed again.
        """
        wanted = max(packed_in, self.least_group)
        sizes = (wanted, *(size for size in _GROUP_SIZES if size < wanted))
        return next((size for size in sizes if row_length % size == 0), None)


FULL_BITS_REPACKINGS = (Repacking(), Repacking(MOST_BITS, _LONG_GROUP))
"""What is tried first, in this order."""


@dataclasses.dataclass
class RequantizationError:
    """Sums over weights that were packed again. Lazy until ``relative`` is read."""

    squared_difference: mx.array = dataclasses.field(default_factory=lambda: mx.array(0.0))
    squared_reference: mx.array = dataclasses.field(default_factory=lambda: mx.array(0.0))

    def add(self, exact: mx.array, actual: mx.array) -> None:
        """Count one matrix, exact and as it is now."""
        exact = exact.astype(mx.float32)
        delta = actual.astype(mx.float32) - exact
        # Row by row first: one float32 sum of a million squares is off by a ten-thousandth.
        self.squared_difference = self.squared_difference + (delta * delta).sum(axis=-1).sum()
        self.squared_reference = self.squared_reference + (exact * exact).sum(axis=-1).sum()

    @property
    def relative(self) -> float:
        """Frobenius norm of the difference over that of the exact weights. Evaluates."""
        if not self.squared_difference.item():
            return 0.0
        return cast(float, mx.sqrt(self.squared_difference / self.squared_reference).item())


def repacking_for(model: nn.Module, num_kept_units: int) -> Repacking:
    """Return the most faithful packing with which a sub-network is no larger than its source.

    Args:
        model: the source, or what an adapter made of it. Evaluates nothing.
        num_kept_units: K of the sub-network.
    """
    fewer = [Repacking(bits, _LONG_GROUP) for bits in _FEWER_BITS]
    layers = list(_layers(model, num_kept_units / unit_shape(model).num_units))
    source_bytes = sum(layer.source_bytes for layer in layers)
    for repacking in (*FULL_BITS_REPACKINGS, *fewer):
        if sum(layer.bytes_with(repacking) for layer in layers) <= source_bytes:
            return repacking
    return fewer[-1]


def pack_again(
    layer: nn.Module,
    packed_in: int,
    repacking: Repacking,
    error: RequantizationError | None = None,
) -> nn.Module:
    """Return a plain linear layer packed; as it is where no group divides its rows. Lazy.

    Args:
        layer: with a plain (out, in) weight.
        packed_in: how many weights shared a scale before.
        repacking: how.
        error: counts what is packed.
    """
    group_size = repacking.group_size(packed_in, layer.weight.shape[1])
    if group_size is None:
        return layer
    # On CUDA mx.quantize ignores strides (mlx 0.32.4).
    plain = plain_linear(mx.contiguous(layer.weight), layer.get("bias"))
    packed: nn.Module = nn.QuantizedLinear.from_linear(plain, group_size, repacking.bits)
    if error is not None:
        error.add(plain.weight, dequantized(packed, mx.float32))
    return packed


def with_changes_packed(
    model: nn.Module, repacking: Repacking, error: RequantizationError | None = None
) -> nn.Module:
    """Return a copy of an adapted model whose layers without units are packed again. Lazy."""
    copy: nn.Module = clone_module(model)
    units = {id(module) for module, _ in _unit_modules(model)}
    for name, module in leaf_modules(model):
        if isinstance(module, ChangedLinear) and id(module) not in units:
            parent, _, leaf = name.rpartition(".")
            module_at(copy, parent)[leaf] = pack_again(module, module.group_size, repacking, error)
    return copy


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What one module takes in the source and in a sub-network.

    Attributes:
        source_bytes: as the source stores it.
        kept_bytes: what a sub-network takes over as it is.
        repacked: weights that are packed again, the length of their rows, and of their groups.
        item_bytes: of a number that is computed with.
    """

    source_bytes: int
    kept_bytes: float
    repacked: tuple[float, int, int] | None = None
    item_bytes: int = 2

    def bytes_with(self, repacking: Repacking) -> float:
        if self.repacked is None:
            return self.kept_bytes
        num_weights, row_length, packed_in = self.repacked
        group_size = repacking.group_size(packed_in, row_length)
        if group_size is None:
            return self.kept_bytes + num_weights * self.item_bytes
        bits = repacking.bits + 16 * self.item_bytes / group_size  # a scale and a bias
        return self.kept_bytes + num_weights * bits / 8


def _layers(model: nn.Module, share: float) -> Iterator[_Layer]:
    """Yield what becomes of each module of a model of whose units a share is kept."""
    axes = {id(module): axis for module, axis in _unit_modules(model)}
    computed = compute_dtype(model)
    for _, module in leaf_modules(model):
        axis = axes.get(id(module))
        kept = 1.0 if axis is None else share
        changed = isinstance(module, ChangedLinear)
        if not changed and not (axis == -1 and is_packed(module)):
            num_bytes = stored_bytes(module)
            yield _Layer(num_bytes, num_bytes * kept)
            continue
        bias = module.get("bias")
        bias_bytes = 0 if bias is None else bias.nbytes
        width = input_dims(module)
        num_weights = module.weight.shape[0] * width * kept
        source_bytes = module.packed_bytes + bias_bytes if changed else stored_bytes(module)
        yield _Layer(
            source_bytes,
            bias_bytes * (1.0 if axis == -1 else kept),
            (num_weights, round(width * kept) if axis == -1 else width, int(module.group_size)),
            module.weight.dtype.size if changed else computed.size,
        )


def _unit_modules(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Yield each module that holds units, and the axis that they lie along."""
    for layer in unit_layers(model).values():
        for part in family_of(model).kind.parts:
            yield part_of(layer, part), part.axis
