"""AdamW over flat weights, clipping and the learning rate's schedule."""

import mlx.core as mx
import pytest

from ifp_mlx.training.config import OptimizerConfig
from ifp_mlx.training.optimizer import AdamW, learning_rate_at


def test_adamw_matches_mlx() -> None:
    from mlx.optimizers import AdamW as Reference

    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, max_grad_norm=1e9)
    weights = mx.random.normal((50,))
    ours = AdamW.start(weights)
    reference = Reference(0.01, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)
    theirs = {"w": weights}
    for number in range(5):
        gradient = mx.random.normal((50,), key=mx.random.key(number))
        ours.update(gradient, 0.01, config)
        theirs = reference.apply_gradients({"w": gradient}, theirs)
    assert mx.allclose(ours.weights, theirs["w"], atol=1e-5)


def test_gradients_are_clipped_to_the_norm() -> None:
    config = OptimizerConfig(max_grad_norm=1.0)
    state = AdamW.start(mx.zeros((4,)))
    assert state.update(mx.full((4,), 50.0), 0.1, config).item() == pytest.approx(100.0)
    assert mx.allclose(state.first, mx.full((4,), 0.1 * 0.5), atol=1e-4)


def test_learning_rate_warms_up_and_decays() -> None:
    config = OptimizerConfig(learning_rate=1.0, final_share=0.1, warmup_steps=10)
    rates = [learning_rate_at(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
