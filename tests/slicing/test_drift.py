"""The share of what a whole mixture asks for that a sub-network lacks."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.slicing.drift import leaves_task, with_drift
from ifp_mlx.units.families import FAMILIES

ModelFactory = Callable[..., nn.Module]

MIXTURES = sorted(name for name, family in FAMILIES.items() if family.kind.name == "expert")
TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35, 8]])


@pytest.mark.parametrize("family", MIXTURES)
def test_watching_drift_changes_nothing(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family)
    selection = select_random(model, 4)
    compact = slice_model(model, selection)
    watched, drift = with_drift(compact, selection, model)
    assert drift.share() is None
    assert mx.array_equal(watched(TOKENS), compact(TOKENS))
    share = drift.share()
    assert share is not None
    assert 0 < share < 1


def test_nothing_is_missing_from_the_whole_model(tiny_model: ModelFactory) -> None:
    model = tiny_model("olmoe")
    watched, drift = with_drift(model, select_random(model, 8), model)
    watched(TOKENS)
    assert drift.share() == 0
    drift.reset()
    assert drift.share() is None


def test_share_is_the_weight_of_missing_experts(tiny_model: ModelFactory) -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)  # one layer: both models route alike
    selection = select_random(model, 4)
    watched, drift = with_drift(slice_model(model, selection), selection, model)
    watched(TOKENS)
    layer = model.layers[0]
    h = model.model.embed_tokens(TOKENS)
    h = h + layer.self_attn(layer.input_layernorm(h), "causal")
    logits = np.array(layer.block_sparse_moe.gate(layer.post_attention_layernorm(h))[0])
    kept = set(np.array(selection.pick.indices[0]).tolist())
    expected = 0.0
    for row in logits:
        best = np.argsort(-row)[:2]
        weights = np.exp(row[best]) / np.exp(row[best]).sum()
        expected += sum(w for e, w in zip(best, weights, strict=True) if int(e) not in kept)
    assert drift.share() == pytest.approx(expected / len(logits), abs=1e-5)


def test_what_is_hardly_better_than_chance_leaves_the_task() -> None:
    assert not leaves_task(0.37, 64, 128)
    assert leaves_task(0.38, 64, 128)
    assert leaves_task(0.19, 96, 128)  # fewer are missing, so less may be
