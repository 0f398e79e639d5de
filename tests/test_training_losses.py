"""The training losses against loops in NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.masking import top_k_mask
from ifp_mlx.training.config import DistillationConfig
from ifp_mlx.training.losses import distillation_loss, mean_pairwise_overlap
from ifp_mlx.training.schedule import Batch


@pytest.mark.parametrize("top_tokens", [0, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_loss_is_the_divergence(top_tokens: int, temperature: float) -> None:
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 7, 23)) * 2
    weights = rng.random(7)
    wanted = 0.0
    for q_logits, p_logits, weight in zip(student, teacher, weights, strict=True):
        kept = np.argsort(-p_logits)[: top_tokens or None]
        p, q = np.exp(p_logits[kept] / temperature), np.exp(q_logits[kept] / temperature)
        p, q = p / p.sum(), q / q.sum()
        wanted += weight * temperature**2 * (p * np.log(p / q)).sum()
    empty = mx.zeros((7,), dtype=mx.int32)
    batch = Batch(empty, empty, empty, mx.array(weights))
    config = DistillationConfig(1.0, top_tokens=top_tokens, temperature=temperature)
    found = distillation_loss(mx.array(student), mx.array(teacher), batch, config)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_pairwise_overlap_matches_a_loop() -> None:
    masks = top_k_mask(mx.random.normal((5, 3, 20)), 7)
    table = np.array(masks)
    pairs = [(a, b) for a in range(5) for b in range(5) if a != b]
    wanted = np.mean([(table[a] * table[b]).sum(-1) / 7 for a, b in pairs], axis=0)
    assert np.allclose(np.array(mean_pairwise_overlap(masks, 7)), wanted, atol=1e-6)
