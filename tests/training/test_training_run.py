"""A whole run: files in, adapter out, and on from where it was stopped."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifp_mlx.adapters.adapter import load_adapter
from ifp_mlx.errors import ConfigError, DataError, TrainingError, UsageError
from ifp_mlx.evaluation.quality import evaluate, load_held_out
from ifp_mlx.evaluation.training_curve import evaluate_trainer
from ifp_mlx.selection.top_k import top_k_mask
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model
from ifp_mlx.training.config import (
    DataConfig,
    OptimizerConfig,
    StageConfig,
    TrainingConfig,
    WarmStartConfig,
)
from ifp_mlx.training.curves import draw_curves
from ifp_mlx.training.run import load_run_config, run_training
from ifp_mlx.units.masks import with_unit_masks

# Two-bit changes of the weights and eight-bit codes of the head, against the trained model.
_CODED_TOLERANCE = 0.1


@pytest.fixture
def config(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> TrainingConfig:
    data = tmp_path / "data"
    held_out = tmp_path / "held-out"
    data.mkdir()
    held_out.mkdir()
    sums = [json.dumps({"prompt": f"Add {i} to 1", "response": str(i + 1)}) for i in range(30)]
    text = [json.dumps({"text": "the same few words again " * 12}) for _ in range(6)]
    (data / "sums.jsonl").write_text("\n".join(sums[:24]))
    (data / "prose.jsonl").write_text("\n".join(text[:4]))
    (held_out / "sums.jsonl").write_text("\n".join(sums[24:]))
    (held_out / "lm_prose.jsonl").write_text("\n".join(text[4:]))
    (data / "tasks.json").write_text(json.dumps({"sums": ["do sums", "calculate"]}))
    return TrainingConfig(
        model=str(tiny_checkpoint(intermediate_size=128, hidden_size=64)),
        keep_units=(64,),
        stages=(StageConfig(1500, 0.5),),
        batch_tokens=512,
        compute_dtype="float32",
        checkpoint_every=2,
        data=DataConfig(
            instructions=(str(data / "sums.jsonl"),),
            documents=(str(data / "prose.jsonl"),),
            descriptions=str(data / "tasks.json"),
            max_tokens=256,
            chunk_tokens=64,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=1),
        warm_start=WarmStartConfig(examples=12, held_out=4, steps=5, batch_size=8),
    )


def test_run_writes_an_adapter_that_predicts_like_the_trained_model(
    config: TrainingConfig, tmp_path: Path
) -> None:
    figures: list[dict[str, Any]] = []
    tokenizer = load_tokenizer(Path(config.model))
    # Documents here are shorter than a held-out document's prompt.
    held_out = load_held_out(tmp_path / "held-out", tokenizer, 4, ["sums"])

    def measure(trainer: Any, _: Any) -> dict[str, float]:
        figures.append(evaluate_trainer(trainer, held_out))
        return figures[-1]

    outcome = run_training(config, tmp_path / "run", evaluate=measure)
    log = [json.loads(line) for line in outcome.log.read_text().splitlines()]
    assert log[-1]["evaluation"] == figures[-1]
    assert [record["step"] for record in log if "grad_norm" in record][:3] == [1, 2, 3]
    draw_curves({"run": outcome.log}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    base, _ = load_model(Path(config.model))
    adapter = load_adapter(outcome.adapter)
    predictor = adapter.predictor(base)

    def masks(batch: Any) -> mx.array:
        return mx.stack([top_k_mask(predictor.scores_of([e.prompt_ids])[0], 64) for e in batch])

    quality = evaluate(with_unit_masks(adapter.apply(base)), held_out["sums"], masks)
    found = quality["sums"].cross_entropy
    assert found == pytest.approx(figures[-1]["instructions@64"], abs=_CODED_TOLERANCE)
    assert adapter.manifest["training"]["digest"] == config.digest()


def test_interrupted_run_ends_with_the_same_adapter(config: TrainingConfig, tmp_path: Path) -> None:
    whole = run_training(config, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        # Steps are logged one step late: the checkpoint of step 2 is written by now.
        if record.get("step") == 3 and "grad_norm" in record:
            raise Stopped

    with pytest.raises(Stopped):
        run_training(config, tmp_path / "cut", report=stop)
    assert load_run_config(tmp_path / "cut") == config
    resumed = run_training(config, tmp_path / "cut", resume=True)
    assert load_adapter(resumed.adapter).fingerprint == load_adapter(whole.adapter).fingerprint


def test_run_refuses_what_it_cannot_do(config: TrainingConfig, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        run_training(config, tmp_path / "full")
    with pytest.raises(UsageError, match="holds no run to resume"):
        run_training(config, tmp_path / "new", resume=True)
    with pytest.raises(TrainingError, match=r"config.json is missing"):
        load_run_config(tmp_path / "new")
    wide = dataclasses.replace(config, keep_units=(128,))
    with pytest.raises(ConfigError, match="must be below the model's 128 units"):
        run_training(wide, tmp_path / "new")
    with pytest.raises(ConfigError, match="no training text"):
        run_training(dataclasses.replace(config, data=DataConfig()), tmp_path / "new")
    lost = dataclasses.replace(config.data, descriptions=str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="no file of task descriptions"):
        run_training(dataclasses.replace(config, data=lost), tmp_path / "new")


def test_curves_need_a_log(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no training log"):
        draw_curves({"run": tmp_path / "none.jsonl"}, tmp_path / "curves.png")
