"""What experts are seen to do, against routers written again in NumPy."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.units.families import FAMILIES
from ifp_mlx.units.modules import unit_shape
from ifp_mlx.units.routing import Routing, with_observed_experts, with_watched_experts

ModelFactory = Callable[..., nn.Module]
Array = np.ndarray[Any, Any]

MIXTURES = sorted(name for name, family in FAMILIES.items() if family.kind.name == "expert")
TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35, 8]])


def softmax(x: Array) -> Array:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def best_two(scores: Array) -> Array:
    return np.argsort(-scores, axis=-1)[:, :2]


def olmoe_gates(logits: Array, _: nn.Module) -> tuple[Array, Array]:
    scores = softmax(logits)
    chosen = best_two(scores)
    return chosen, np.take_along_axis(scores, chosen, axis=-1)


def mixtral_gates(logits: Array, _: nn.Module) -> tuple[Array, Array]:
    chosen = best_two(logits)
    return chosen, softmax(np.take_along_axis(logits, chosen, axis=-1))


def deepseek_v3_gates(logits: Array, block: nn.Module) -> tuple[Array, Array]:
    scores = 1 / (1 + np.exp(-logits))
    corrected = scores + np.array(block.gate.e_score_correction_bias)
    groups = corrected.reshape(len(logits), 2, 4)
    worse = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1).argmin(axis=-1)  # of two groups
    groups[np.arange(len(logits)), worse] = 0
    chosen = best_two(groups.reshape(len(logits), 8))
    gates = np.take_along_axis(scores, chosen, axis=-1)
    return chosen, 1.5 * gates / gates.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("family", "block_name", "reference"),
    [
        ("olmoe", "mlp", olmoe_gates),
        ("mixtral", "block_sparse_moe", mixtral_gates),
        ("deepseek_v3", "mlp", deepseek_v3_gates),
    ],
)
def test_routing_is_that_of_the_model(
    tiny_model: ModelFactory,
    family: str,
    block_name: str,
    reference: Callable[[Array, nn.Module], tuple[Array, Array]],
) -> None:
    model = tiny_model(family)
    block = model.layers[1][block_name]
    x = mx.random.normal((1, 5, 32))
    seen: list[Routing] = []
    observed = with_observed_experts(model, lambda _, r: seen.append(r)).layers[1][block_name]
    assert mx.array_equal(observed(x), block(x))
    (routing,) = seen
    chosen, gates = reference(np.array(x[0] @ block.gate.weight.T), block)
    found, expected = np.array(routing.experts[0]), np.zeros((5, 8))
    np.put_along_axis(expected, chosen, gates, axis=-1)
    dense = np.zeros((5, 8))
    np.put_along_axis(dense, found, np.array(routing.gates[0]), axis=-1)
    np.testing.assert_allclose(dense, expected, atol=1e-6)
    outputs = block.switch_mlp(x, routing.experts)
    np.testing.assert_allclose(
        np.array(routing.norms), np.linalg.norm(np.array(outputs), axis=-1), rtol=1e-5
    )


@pytest.mark.parametrize("family", MIXTURES)
def test_watching_changes_nothing(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family)
    seen: list[Routing] = []
    observed = with_observed_experts(model, lambda _, routing: seen.append(routing))
    assert mx.array_equal(observed(TOKENS), model(TOKENS))
    shape = unit_shape(model)
    assert len(seen) == len(shape.layers)
    for routing in seen:
        assert routing.experts.shape == routing.gates.shape == routing.norms.shape == (1, 8, 2)
        assert (routing.gates > 0).all().item()
        assert (routing.experts < shape.num_units).all().item()


@pytest.mark.parametrize("family", MIXTURES)
def test_where_tokens_go_is_told_without_more_work(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family)
    routings: list[Routing] = []
    with_observed_experts(model, lambda _, routing: routings.append(routing))(TOKENS)
    told: dict[int, mx.array] = {}
    watched = with_watched_experts(model, told.__setitem__)
    assert mx.array_equal(watched(TOKENS), model(TOKENS))
    assert list(told) == list(range(len(routings)))
    for position, routing in enumerate(routings):
        assert mx.array_equal(told[position].reshape(routing.experts.shape), routing.experts)
