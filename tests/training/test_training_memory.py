"""What a run is predicted to take is what it takes, and steps are cut to what there is."""

import dataclasses
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.errors import ResourceError
from ifp_mlx.selection.predictor import PredictorHead
from ifp_mlx.text.examples import ExampleSet
from ifp_mlx.training.config import DataConfig, LoRAConfig, StageConfig, TrainingConfig
from ifp_mlx.training.memory import PROCESS_BYTES, fit_to_memory, predict_training
from ifp_mlx.training.trainer import Trainer
from ifp_mlx.training.warm_start import WarmStart
from ifp_mlx.units.modules import stored_bytes

ModelFactory = Callable[..., nn.Module]
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
LENGTH, COUNT = 64, 32


def config(**changes: object) -> TrainingConfig:
    said = TrainingConfig(
        keep_units=(256,),
        stages=(StageConfig(2 * LENGTH * COUNT),),
        batch_tokens=LENGTH * COUNT,
        compute_dtype="float32",
        data=DataConfig(max_tokens=LENGTH),
        lora=LoRAConfig(rank=16),
    )
    return dataclasses.replace(said, **changes)  # type: ignore[arg-type]


def peak_of_steps(model: nn.Module, run: TrainingConfig) -> int:
    """Return what a run takes beside the model itself."""
    rng = np.random.default_rng(0)
    starts = np.arange(COUNT) * LENGTH
    examples = ExampleSet(
        tokens=rng.integers(0, 67, LENGTH * COUNT).astype(np.uint16),
        is_target=np.ones(LENGTH * COUNT, dtype=np.bool_),
        spans=np.stack([starts, starts + LENGTH], axis=1),
        sources=np.stack([starts, starts + 8], axis=1),
        domains=np.zeros(COUNT, dtype=np.int16),
        domain_names=("all",),
    )
    prior = mx.random.normal((3, 512), key=mx.random.key(1))
    start = WarmStart(
        prior=prior,
        head=PredictorHead(256, prior),
        features=rng.normal(size=(COUNT, 256)).astype(np.float32),
        example_ids=np.arange(COUNT),
        description_features={},
        targets=np.zeros((0, 3, 512), dtype=np.float16),
        target_ids=np.zeros(0, dtype=np.int64),
        agreement={},
    )
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    Trainer(model, examples, run, start).run()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("rank", [16, 0], ids=["low-rank", "full"])
@pytest.mark.parametrize("parts", [1, 8])
def test_prediction_covers_what_a_run_takes(
    tiny_model: ModelFactory, rank: int, parts: int
) -> None:
    model = tiny_model("llama", **SIZES)
    run = config(lora=LoRAConfig(rank=rank), grad_accumulation_steps=parts)
    predicted = predict_training(model, run, LENGTH)
    weights = stored_bytes(model)
    assert predicted.weights_bytes == weights
    peak = peak_of_steps(model, run)
    rest = predicted.total_bytes - PROCESS_BYTES - weights
    assert rest / 3 < peak < rest


def test_steps_are_cut_to_what_fits(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama", **SIZES)
    whole = predict_training(model, config(), LENGTH).total_bytes
    assert fit_to_memory(model, config(), LENGTH, whole) == config()
    half = predict_training(model, config(grad_accumulation_steps=2), LENGTH).total_bytes
    fitted = fit_to_memory(model, config(), LENGTH, half)
    assert fitted == config(grad_accumulation_steps=2)
    least = predict_training(model, config(grad_accumulation_steps=COUNT), LENGTH).total_bytes
    assert fit_to_memory(model, config(), LENGTH, least).grad_accumulation_steps == COUNT
    with pytest.raises(ResourceError, match=r"even one example at a time .* there are 0\.50 GB"):
        fit_to_memory(model, config(), LENGTH, PROCESS_BYTES)
    full = config(lora=LoRAConfig(rank=0))
    with pytest.raises(ResourceError, match="`lora_rank` 16 takes far less"):
        fit_to_memory(model, full, LENGTH, PROCESS_BYTES)
