"""The training losses against loops in NumPy."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from ifp_mlx.selection.top_k import top_k_mask
from ifp_mlx.training import losses
from ifp_mlx.training.config import DistillationConfig
from ifp_mlx.training.losses import distillation_loss, mean_pairwise_overlap
from ifp_mlx.training.schedule import Batch
from ifp_mlx.units.modules import clone_module


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_loss_is_the_divergence(temperature: float) -> None:
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 7, 23)) * 2
    weights = rng.random(7)
    wanted = 0.0
    for q_logits, p_logits, weight in zip(student, teacher, weights, strict=True):
        p, q = np.exp(p_logits / temperature), np.exp(q_logits / temperature)
        p, q = p / p.sum(), q / q.sum()
        wanted += weight * temperature**2 * (p * np.log(p / q)).sum()
    config = DistillationConfig(1.0, temperature=temperature)
    found = distillation_loss(mx.array(student), mx.array(teacher), mx.array(weights), config)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_pairwise_overlap_matches_a_loop() -> None:
    masks = top_k_mask(mx.random.normal((5, 3, 20)), 7)
    table = np.array(masks)
    pairs = [(a, b) for a in range(5) for b in range(5) if a != b]
    wanted = np.mean([(table[a] * table[b]).sum(-1) / 7 for a, b in pairs], axis=0)
    assert np.allclose(np.array(mean_pairwise_overlap(masks, 7)), wanted, atol=1e-6)


def test_loss_in_chunks_is_the_loss_at_once(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(intermediate_size=32)
    teacher = clone_module(model)
    teacher.update(tree_map(lambda weight: 1.2 * weight, model.parameters()))
    rng = np.random.default_rng(0)
    batch = Batch(
        mx.array(rng.integers(0, 50, size=(3, 11))),
        mx.array(rng.permutation(33)[:21]),
        mx.array(rng.integers(0, 50, size=21)),
        mx.array(rng.random(21).astype(np.float32)),
    )
    model.freeze()
    model.model.layers[0].unfreeze()

    def loss_and_gradient(chunk: int) -> tuple[mx.array, dict[str, mx.array]]:
        monkeypatch.setattr(losses, "CHUNK_POSITIONS", chunk)
        function = nn.value_and_grad(
            model, lambda: losses.training_loss(model, batch, teacher, DistillationConfig(0.7))
        )
        loss, gradient = function()
        return loss, dict(tree_flatten(gradient))

    whole, whole_gradient = loss_and_gradient(64)
    parts, parts_gradient = loss_and_gradient(4)
    assert mx.allclose(whole, parts, rtol=1e-5)
    for name, wanted in whole_gradient.items():
        assert mx.abs(wanted).max() > 0
        assert mx.allclose(parts_gradient[name], wanted, rtol=1e-4, atol=1e-6), name
