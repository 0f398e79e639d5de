"""What the predictor's head learns from the masks' gradient, and the alarm when masks collapse."""

import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.errors import TrainingError
from ifp_mlx.selection.predictor import PredictorHead
from ifp_mlx.training.config import JointConfig
from ifp_mlx.training.optimizer import AdamW
from ifp_mlx.training.predictor_step import PredictorTrainer, centred


@pytest.mark.parametrize("mean_weight", [0.0, 0.3, 1.0])
def test_centred_gradient_keeps_a_share_of_the_common_part(mean_weight: float) -> None:
    gradient = mx.random.normal((6, 3, 20), key=mx.random.key(0)) + 5.0
    kept = centred(gradient, mx.distributed.init(), mean_weight)
    common = gradient.mean(axis=0)
    assert mx.allclose(kept.mean(axis=0), mean_weight * common, atol=1e-5)
    assert mx.allclose(kept - kept.mean(axis=0), gradient - common, atol=1e-5)


def test_collapse_rolls_back_then_stops() -> None:
    prior = mx.random.normal((3, 96), key=mx.random.key(1))
    head = PredictorHead(16, prior)
    head.expand.weight = mx.random.normal(head.expand.weight.shape, key=mx.random.key(2))
    features = np.random.default_rng(3).normal(size=(12, 16)).astype(np.float32)
    config = JointConfig(max_overlap_rise=0.01, rollbacks=1)
    trainer = PredictorTrainer(head, None, features, 48, config, 0)
    good = np.array(head.expand.weight)
    assert trainer.start_overlap < 0.9

    def collapse() -> None:
        trainer.state = AdamW.start(trainer.state.weights * 0.0)
        trainer.install()
        head.prior = prior

    collapse()
    assert trainer.probe_overlap() == pytest.approx(1.0)
    trainer.check_collapse(7)
    assert trainer.frozen
    assert np.array_equal(np.array(head.expand.weight), good)
    collapse()
    with pytest.raises(TrainingError, match=r"collapsed at step 9: .* rose from"):
        trainer.check_collapse(9)
