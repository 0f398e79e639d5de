"""A model that runs with one layer in memory gives what the loaded one gives."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from ifp_mlx.selection.calibration import CalibrationExample, calibrate
from ifp_mlx.selection.selectors import PromptSelector
from ifp_mlx.slicing.layerwise import layerwise_model
from ifp_mlx.storage.weights import load_model
from ifp_mlx.units.families import FAMILIES

CheckpointFactory = Callable[..., Path]
TOKENS = [3, 14, 15, 9, 26, 5, 35, 8]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layerwise_model_gives_the_same_logits_and_activations(
    tiny_checkpoint: CheckpointFactory, family: str
) -> None:
    path = tiny_checkpoint(family)
    layerwise = layerwise_model(path)
    model = load_model(path)[0]
    for _ in range(2):  # a second pass reads the layers again
        assert mx.array_equal(layerwise(mx.array([TOKENS])), model(mx.array([TOKENS])))
        scores = PromptSelector(layerwise).scores([TOKENS, TOKENS[:3]])
        assert mx.array_equal(scores, PromptSelector(model).scores([TOKENS, TOKENS[:3]]))


def test_layerwise_model_computes_in_the_asked_type(tiny_checkpoint: CheckpointFactory) -> None:
    layerwise = layerwise_model(tiny_checkpoint(), mx.bfloat16)
    assert layerwise(mx.array([TOKENS])).dtype == mx.bfloat16


def test_layerwise_model_can_be_calibrated(tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint()
    examples = [CalibrationExample(TOKENS), CalibrationExample(TOKENS[::-1])]
    found = calibrate(layerwise_model(path), examples)
    expected = calibrate(load_model(path)[0], examples)
    assert mx.allclose(found.importance, expected.importance, rtol=1e-6)


def test_layers_are_not_kept(tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint(hidden_size=64, intermediate_size=2048, vocab_size=264)
    layerwise = layerwise_model(path)
    mx.eval(layerwise(mx.array([TOKENS])))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(layerwise(mx.array([TOKENS])))
    layer_bytes = 3 * 64 * 2048 * 4
    assert mx.get_active_memory() - before < layer_bytes // 4
    assert mx.get_peak_memory() - before < 2 * layer_bytes
