"""How much of what a whole mixture would ask for is missing from a sub-network of it.

A sub-network's router chooses among the experts that are there. The whole router is small, so it
stays beside it and is asked now and then: which share of the weight that it gives to the experts of
a token goes to experts that are not there? A task's own text keeps that share low; a conversation
that leaves its task raises it.
"""

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.selection.selection import Selection
from ifp_mlx.units.modules import (
    clone_module,
    family_of,
    is_packed,
    part_of,
    replace_part,
    unit_layers,
)

_DECODING_STRIDE = 16
"""One token in so many is looked at while answering: each look costs a few kernels a layer."""

_PROMPT_TOKENS = 128
"""Of each piece of a prompt the last tokens are looked at."""

_OFF_TASK = 0.75
"""Of what experts drawn at random would miss. In docs/experts.md: 4 to 7 of 100 texts of a task are
above, 4 to 7 of 10 texts of others, from half of the experts on."""


def leaves_task(missing_share: float, num_kept: int, num_experts: int) -> bool:
    """Return whether text is off the task that a sub-network's experts were chosen for.

    Args:
        missing_share: what ``Drift.share`` says after reading it.
        num_kept: K, below the number of experts.
        num_experts: of the whole mixture, in each layer.
    """
    return missing_share > _OFF_TASK * (1 - num_kept / num_experts)


class Drift:
    """What was seen since ``reset``."""

    def __init__(self) -> None:
        self._shares: list[mx.array] = []

    def add(self, shares: mx.array) -> None:
        """Add the missing shares of some tokens in one layer, (T,) float32. Lazy."""
        self._shares.append(shares)

    def reset(self) -> None:
        """Forget what was seen."""
        self._shares.clear()

    def share(self) -> float | None:
        """Return the mean missing share over tokens and layers, None if none was seen."""
        if not self._shares:
            return None
        return cast(float, mx.concatenate(self._shares).mean().item())


def with_drift(
    compact: nn.Module, selection: Selection, whole: nn.Module
) -> tuple[nn.Module, Drift]:
    """Return a copy of a compact mixture, sharing its arrays, and what it shows of its drift.

    Args:
        compact: the sub-network; it is not changed and computes as before.
        selection: its experts.
        whole: the model that it was cut from; only its routers are evaluated.
    """
    router = family_of(compact).kind.parts[0]
    copy: nn.Module = clone_module(compact)
    drift = Drift()
    whole_layers = unit_layers(whole)
    num_chosen = _num_chosen(compact)
    masks = selection.pick.mask()
    for position, (index, layer) in enumerate(unit_layers(copy).items()):
        watched = _WatchedRouter(
            part_of(layer, router),
            part_of(whole_layers[index], router),
            1.0 - masks[position],
            num_chosen,
            drift,
        )
        replace_part(layer, router, watched)
    return copy, drift


class _WatchedRouter(nn.Module):
    """A compact model's router that asks the whole one now and then."""

    def __init__(
        self,
        router: nn.Module,
        whole: nn.Module,
        missing: mx.array,
        num_chosen: int,
        drift: Drift,
    ):
        super().__init__()
        self.router = router
        self._beside = (whole, missing)  # in a tuple: these are not the model's own parameters
        self._num_chosen = num_chosen
        self._drift = drift
        self._num_calls = 0

    def __call__(self, x: mx.array) -> object:
        """Route (B, T, D) hidden states as the compact model does."""
        is_prompt = x.shape[-2] > 1
        if is_prompt or self._num_calls % _DECODING_STRIDE == 0:
            shares = self._missing_shares(x[..., -_PROMPT_TOKENS:, :])
            if is_prompt:  # or the hidden states of the whole piece would wait for it
                mx.async_eval(shares)
            self._drift.add(shares)
        self._num_calls += 0 if is_prompt else 1
        return self.router(x)

    def _missing_shares(self, x: mx.array) -> mx.array:
        whole, missing = self._beside
        logits = _logits(whole, x).astype(mx.float32).reshape(-1, missing.shape[0])  # (T, E)
        chosen = mx.argpartition(-logits, self._num_chosen - 1, axis=-1)[:, : self._num_chosen]
        weights = mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1)
        return (weights * missing[chosen]).sum(axis=-1)


def _logits(router: nn.Module, x: mx.array) -> mx.array:
    """Return the (..., E) logits of a router, whether it only makes them or chooses as well."""
    if is_packed(router) or isinstance(router, nn.Linear):
        return router(x)  # type: ignore[no-any-return]
    logits: mx.array = x @ router.weight.T
    return logits if router.get("bias") is None else logits + router.bias


def _num_chosen(model: nn.Module) -> int:
    family = family_of(model)
    assert family.kind.router is not None
    settings = model.args if family.settings is None else getattr(model.args, family.settings)
    key = family.kind.router.chosen
    return int(settings[key] if isinstance(settings, dict) else getattr(settings, key))
