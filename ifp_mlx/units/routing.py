"""Watching the experts of a mixture: which see a token, with what weight, and what they add.

The blocks of mlx-lm's mixtures route in many ways (softmax or sigmoid, renormalised or not, with
correction biases, groups, scales), but all of them end alike: the chosen experts' outputs, one
behind the other, times their gate values, summed. So a block is asked for its gate values by
calling it once more with outputs that are unit vectors: what comes back are the factors.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.units.modules import (
    clone_module,
    copy_module,
    family_of,
    module_at,
    unit_layers,
)

_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
"""What blocks call the experts that see every token: no part of what is chosen."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """What the experts of one layer did with some tokens.

    Attributes:
        experts: (B, T, k) int32, the experts that each token was sent to.
        gates: (B, T, k) float32, what their outputs were multiplied by.
        norms: (B, T, k) float32, the L2 norm of each of those outputs.
    """

    experts: mx.array
    gates: mx.array
    norms: mx.array


Observe = Callable[[int, Routing], None]
"""Takes a layer's position among those that have experts, and what they did."""


def with_observed_experts(model: nn.Module, observe: Observe) -> nn.Module:
    """Return a copy of ``model``, sharing its arrays, that shows what its experts do.

    Args:
        model: an mlx-lm mixture of a family in the table; it is not changed.
        observe: called for each layer that is passed.
    """
    stacks = family_of(model).kind.parts[-1].path.rpartition(".")[0]
    block_path, _, stacks_name = stacks.rpartition(".")
    parent_path, _, block_name = block_path.rpartition(".")
    copy: nn.Module = clone_module(model)
    for position, layer in enumerate(unit_layers(copy).values()):
        block = module_at(layer, block_path)
        observed = _ObservedBlock(block, stacks_name, functools.partial(observe, position))
        module_at(layer, parent_path)[block_name] = observed
    return copy


def with_watched_experts(model: nn.Module, watch: Callable[[int, mx.array], None]) -> nn.Module:
    """Return a copy of ``model``, sharing its arrays, that tells where it sends tokens.

    It computes what ``model`` does, and nothing more.

    Args:
        model: an mlx-lm mixture of a family in the table; it is not changed.
        watch: called for each layer that is passed, with its position among those that have experts
            and the (..., k) experts that each token is sent to. Lazy.
    """
    stacks = family_of(model).kind.parts[-1].path.rpartition(".")[0]
    parent_path, _, name = stacks.rpartition(".")
    copy: nn.Module = clone_module(model)
    for position, layer in enumerate(unit_layers(copy).values()):
        parent = module_at(layer, parent_path)
        parent[name] = _WatchedStacks(parent[name], functools.partial(watch, position))
    return copy


class _WatchedStacks(nn.Module):
    """Stacked experts that tell which are asked."""

    def __init__(self, stacks: nn.Module, watch: Callable[[mx.array], None]):
        super().__init__()
        self.stacks = stacks
        self._watch = watch

    def __call__(self, x: mx.array, experts: mx.array, *rest: Any) -> mx.array:
        self._watch(experts)
        outputs: mx.array = self.stacks(x, experts, *rest)
        return outputs


class _ObservedBlock(nn.Module):
    """A block that holds experts and shows what they did."""

    def __init__(self, block: nn.Module, stacks: str, observe: Callable[[Routing], None]):
        super().__init__()
        self.block = block
        self._stacks = stacks
        self._observe = observe

    def __call__(self, *inputs: mx.array) -> mx.array:
        watched = copy_module(self.block)
        spy = _Spy(self.block[self._stacks])
        watched[self._stacks] = spy
        output: mx.array = watched(*inputs)
        asked = copy_module(self.block)
        asked[self._stacks] = _UnitVectors()
        for name in _SHARED:
            if asked.get(name) is not None:
                asked[name] = _Nothing()
        assert spy.experts is not None
        assert spy.outputs is not None
        num_chosen = spy.experts.shape[-1]
        gates = asked(*inputs)[..., :num_chosen].astype(mx.float32)
        norms = mx.linalg.norm(spy.outputs.astype(mx.float32), axis=-1)
        size = gates.shape  # some blocks flatten what they are given
        self._observe(Routing(spy.experts.reshape(size), gates, norms.reshape(size)))
        return output


class _Spy(nn.Module):
    """Stacked experts that remember which were asked and what they said."""

    def __init__(self, stacks: nn.Module):
        super().__init__()
        self.stacks = stacks
        self._seen: tuple[mx.array, mx.array] | None = None

    def __call__(self, x: mx.array, experts: mx.array, *rest: Any) -> mx.array:
        outputs: mx.array = self.stacks(x, experts, *rest)
        self._seen = experts, outputs
        return outputs

    @property
    def experts(self) -> mx.array | None:
        return None if self._seen is None else self._seen[0]

    @property
    def outputs(self) -> mx.array | None:
        return None if self._seen is None else self._seen[1]


class _UnitVectors(nn.Module):
    """In the place of the chosen experts: the j-th says 1 in place j and 0 elsewhere."""

    def __call__(self, x: mx.array, experts: mx.array, *_: Any) -> mx.array:
        num_chosen = experts.shape[-1]
        vectors = mx.eye(num_chosen, x.shape[-1], dtype=mx.float32)
        return mx.broadcast_to(vectors, (*experts.shape, x.shape[-1]))


class _Nothing(nn.Module):
    """In the place of a shared expert."""

    def __call__(self, x: mx.array, *_: Any) -> mx.array:
        return mx.zeros(x.shape, dtype=mx.float32)
