"""Masking and watching FFN units, in any family.

Every family ends its FFN in one linear layer (*down*) whose input is the activation of the units,
one column each. So a mask over units is a factor in front of it, and measuring units is looking at
what goes into it: both work without knowing the activation function.
"""

import functools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import SelectionError
from ifp_mlx.units.kinds import Part
from ifp_mlx.units.modules import family_of, part_of, unit_layers, with_parts


class MaskedDown(nn.Module):
    """A down projection behind a mask over its input, the unit activations.

    ``mask`` is (F,) for every sample alike or (B, F) for one mask a sample; None is no mask.
    It is state of a forward pass, not a parameter: it is neither saved nor trained.
    """

    def __init__(self, down: nn.Module):
        super().__init__()
        self.down = down
        self._mask: mx.array | None = None

    def __call__(self, activations: mx.array) -> mx.array:
        """Map (B, T, F) unit activations to (B, T, D)."""
        mask = self._mask
        if mask is not None:
            mask = mask.astype(activations.dtype)
            activations = activations * (mask if mask.ndim == 1 else mask[:, None, :])
        return self.down(activations)  # type: ignore[no-any-return]


class ObservedDown(nn.Module):
    """A down projection that shows its input, the (B, T, F) unit activations, to a function."""

    def __init__(self, down: nn.Module, observe: Callable[[mx.array], None]):
        super().__init__()
        self.down = down
        self._observe = observe

    def __call__(self, activations: mx.array) -> mx.array:
        """Map (B, T, F) unit activations to (B, T, D)."""
        self._observe(activations)
        return self.down(activations)  # type: ignore[no-any-return]


def down_part(model: nn.Module) -> Part:
    """Return the part of which FFN units are columns.

    Raises:
        SelectionError: the units of this family are of another kind.
    """
    part = family_of(model).kind.columns
    if part is None:
        raise SelectionError(f"{family_of(model).model_type} models have no FFN units to mask")
    return part


def downs(model: nn.Module) -> list[nn.Module]:
    """Return the down projection of each layer that has units."""
    part = down_part(model)
    return [part_of(layer, part) for layer in unit_layers(model).values()]


def with_observed_units(model: nn.Module, observe: Callable[[int, mx.array], None]) -> nn.Module:
    """Return a copy of ``model``, sharing its arrays, that shows the activations of its units.

    Args:
        model: not changed.
        observe: called for each layer that is passed, with its position among those that have
            units and its (B, T, F) activations.
    """

    def observed(position: int, down: nn.Module) -> nn.Module:
        return ObservedDown(down, functools.partial(observe, position))

    return with_parts(model, down_part(model), observed)


def with_unit_masks(model: nn.Module) -> nn.Module:
    """Return a copy of ``model``, sharing its arrays, whose FFN units can be masked."""
    return with_parts(model, down_part(model), lambda _, down: MaskedDown(down))


def set_unit_masks(model: nn.Module, masks: mx.array | None) -> None:
    """Set the masks of a model made by ``with_unit_masks``.

    Args:
        model: changed in place.
        masks: (L, F) for every sample alike, (B, L, F) for one mask a sample, or None for none.

    Raises:
        SelectionError: the masks do not have one row a layer.
    """
    masked = downs(model)
    if masks is not None and masks.shape[-2] != len(masked):
        raise SelectionError(f"masks have {masks.shape[-2]} layers, the model has {len(masked)}")
    for index, down in enumerate(masked):
        down._mask = None if masks is None else masks[..., index, :]
