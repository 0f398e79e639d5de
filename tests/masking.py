"""The reference for sub-networks: the whole model with the other units masked."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.selection.selection import Selection
from ifp_mlx.units.kinds import Part
from ifp_mlx.units.masks import set_unit_masks, with_unit_masks
from ifp_mlx.units.modules import clone_module, family_of, is_packed, module_at, unit_layers


def masked(model: nn.Module, selection: Selection) -> nn.Module:
    """Return a copy of ``model`` in which units that are not selected count for nothing."""
    pick = selection.pick
    if family_of(model).kind.name == "ffn":
        with_masks = with_unit_masks(model)
        set_unit_masks(with_masks, pick.mask())
        return with_masks
    copy: nn.Module = clone_module(model)
    router, *others = family_of(model).kind.parts
    biases = [part for part in (router, *others) if set(part.arrays) & {"expert_bias", _CORRECTION}]
    for mask, layer in zip(pick.mask(), unit_layers(copy).values(), strict=True):
        penalty = mx.where(mask > 0, 0.0, -mx.inf)  # (E,)
        for part in biases:
            holder = module_at(layer, part.path)
            for name in ("expert_bias", _CORRECTION):
                if name in part.arrays and holder.get(name) is not None:
                    holder[name] = holder[name] + penalty
        _replace(layer, router, _MaskedRouter(module_at(layer, router.path), penalty))
    return copy


_CORRECTION = "e_score_correction_bias"


class _MaskedRouter(nn.Module):
    """A router whose logits of some experts are minus infinity.

    A router that only makes logits has the penalty added. One that also chooses is given one more
    input, which is 1 and has the penalties as its weights.
    """

    def __init__(self, router: nn.Module, penalty: mx.array):
        super().__init__()
        self.router = router
        self._penalty = penalty
        self._is_linear = isinstance(router, nn.Linear) or is_packed(router)
        if not self._is_linear:
            router.weight = mx.concatenate([router.weight, penalty[:, None]], axis=1)

    def __call__(self, x: mx.array) -> Any:
        if self._is_linear:
            return self.router(x) + self._penalty
        return self.router(mx.concatenate([x, mx.ones((*x.shape[:-1], 1), x.dtype)], axis=-1))


def _replace(layer: nn.Module, part: Part, module: nn.Module) -> None:
    parent, _, name = part.path.rpartition(".")
    module_at(layer, parent)[name] = module
