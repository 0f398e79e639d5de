"""The experts of an mlx-lm mixture computed in other ways: all of them, or some of them not at all.

Both take the place of mlx-lm's stacked experts and can be cut like them.
"""

import time
from collections.abc import Callable
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.selection.selection import Selection
from ifp_mlx.units.kinds import Part
from ifp_mlx.units.modules import family_of, part_of, unit_layers, with_parts

TOLERANCE = 0.02
"""Relative; half-precision sums over a few hundred values stay below 0.01."""

_TOKENS = (4, 300)  # gathered as they come, and sorted by expert first
_MANY_TOKENS = 4096  # as many as are read at once; on a CPU they would take minutes


class AllExperts(nn.Module):
    """Every expert for every token, with three plain products; the chosen ones' outputs are kept.

    For machines on which gathered products are missing, wrong or slower.
    """

    def __init__(self, stacks: nn.Module):
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self[name] = stacks[name]

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """Map (..., D) and the (..., k) chosen experts to their (..., k, D) outputs."""
        num_chosen, width = experts.shape[-1], x.shape[-1]
        tokens = x.reshape(1, -1, width)

        def product(inputs: mx.array, name: str) -> mx.array:
            weight: mx.array = self[name].weight
            return inputs @ weight.swapaxes(1, 2)

        units = nn.silu(product(tokens, "gate_proj")) * product(tokens, "up_proj")  # (E, N, F)
        outputs = product(units, "down_proj")  # (E, N, D)
        chosen = outputs[experts.reshape(-1, num_chosen), mx.arange(tokens.shape[1])[:, None]]
        return chosen.reshape(*experts.shape, width)


class _EmptySlots(nn.Module):
    """Stacked experts of which some give nothing when they are asked."""

    def __init__(self, stacks: nn.Module, mask: mx.array):
        super().__init__()
        self.stacks = stacks
        self._mask = mask

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        outputs: mx.array = self.stacks(x, experts)
        return outputs * self._mask[experts][..., None].astype(outputs.dtype)


def stacks_part(model: nn.Module) -> Part:
    """Return where a layer of a mixture has its stacked experts."""
    return Part(family_of(model).kind.parts[-1].path.rpartition(".")[0])


def with_zero_slots(model: nn.Module, selection: Selection) -> nn.Module:
    """Return a copy of a whole mixture whose unselected experts give nothing.

    Its router still chooses them: their slots stay empty. A slice has the next best instead.
    """
    mask = selection.pick.mask()
    return with_parts(
        model, stacks_part(model), lambda position, stacks: _EmptySlots(stacks, mask[position])
    )


def with_all_experts(model: nn.Module) -> nn.Module:
    """Return a copy of a mixture that computes every expert for every token."""
    return with_parts(model, stacks_part(model), lambda _, stacks: AllExperts(stacks))


def choose_products(
    model: nn.Module, use: Callable[[nn.Module], object]
) -> tuple[nn.Module, dict[str, dict[str, float]]]:
    """Return the mixture in the faster of the ways that are right here, and what was found.

    Args:
        model: as mlx-lm loads it.
        use: evaluates a model on some text; timed at its second call.

    Raises:
        SystemExit: neither way is right.
    """
    ways = {"gathered": model, "all": with_all_experts(model)}
    errors = {name: product_error(way) for name, way in ways.items()}
    seconds: dict[str, float] = {}
    for name, way in ways.items():
        if errors[name] < TOLERANCE:
            use(way)
            start = time.perf_counter()
            use(way)
            seconds[name] = round(time.perf_counter() - start, 3)
    if not seconds:
        raise SystemExit(f"the products of experts are wrong on this machine: {errors}")
    fastest = min(seconds, key=lambda name: seconds[name])
    return ways[fastest], {"relative_error": errors, "seconds": seconds}


def product_error(model: nn.Module) -> float:
    """Return the worst relative error of the first layer's experts, infinity if they do not run.

    The reference is one float32 product an expert, of the same rounded inputs.
    """
    stacks = part_of(next(iter(unit_layers(model).values())), stacks_part(model))
    gate, up, down = (stacks[f"{name}_proj"].weight for name in ("gate", "up", "down"))
    sizes = _TOKENS if mx.default_device() == mx.cpu else (*_TOKENS, _MANY_TOKENS)
    worst = 0.0
    for num_tokens in sizes:
        key = mx.random.key(num_tokens)
        x = mx.random.normal((1, num_tokens, gate.shape[2]), key=key).astype(gate.dtype)
        experts = mx.random.randint(0, gate.shape[0], (1, num_tokens, 4), key=key)
        try:
            found = stacks(x, experts).astype(mx.float32)
            mx.eval(found)
        except RuntimeError as error:
            print(f"{type(stacks).__name__} does not run here: {error}", flush=True)
            return float("inf")
        expected = mx.zeros_like(found)
        wide = x.astype(mx.float32)
        for expert in range(gate.shape[0]):
            weights = [stack[expert].astype(mx.float32).T for stack in (gate, up, down)]
            output = (nn.silu(wide @ weights[0]) * (wide @ weights[1])) @ weights[2]
            expected = mx.where((experts == expert)[..., None], output[..., None, :], expected)
        distance = mx.linalg.norm(found - expected) / mx.linalg.norm(expected)
        worst = max(worst, cast(float, mx.nan_to_num(distance, nan=mx.inf).item()))
    return worst
