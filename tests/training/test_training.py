"""The trainer on a tiny model: it learns, stops, resumes, and trains only what it should."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from ifp_mlx.errors import TrainingError
from ifp_mlx.selection.top_k import soft_top_k, standardised, top_k_mask
from ifp_mlx.text.examples import ExampleSet
from ifp_mlx.training.config import (
    DataConfig,
    DistillationConfig,
    JointConfig,
    LoRAConfig,
    OptimizerConfig,
    StageConfig,
    TrainingConfig,
    WarmStartConfig,
)
from ifp_mlx.training.masked_model import training_dtype
from ifp_mlx.training.predictor_step import PredictorTrainer
from ifp_mlx.training.schedule import make_batch, make_schedule
from ifp_mlx.training.trainer import Trainer
from ifp_mlx.training.warm_start import WarmStart, make_warm_start
from ifp_mlx.units.masks import set_unit_masks
from ifp_mlx.units.modules import clone_module

_KEEP = (64, 96)

# Sums of the same float32 products in another order.
_ORDER_TOLERANCE = 2e-4


def _examples(count: int = 60) -> ExampleSet:
    """Sequences of three domains: counting up by one, by two and by three."""
    rng = np.random.default_rng(0)
    tokens: list[int] = []
    target: list[bool] = []
    spans, sources, domains = [], [], []
    for index in range(count):
        domain = index % 3
        length = int(rng.integers(8, 24))
        start = len(tokens)
        tokens += [
            int(t) for t in (rng.integers(1, 60) + np.arange(length) * (domain + 1)) % 66 + 1
        ]
        target += [position >= length // 2 for position in range(length)]
        spans.append((start, start + length))
        sources.append((start, start + length // 2))
        domains.append(domain)
    return ExampleSet(
        np.array(tokens, dtype=np.uint16),
        np.array(target),
        np.array(spans),
        np.array(sources),
        np.array(domains, dtype=np.int16),
        ("ones", "twos", "threes"),
        ("threes",),
    )


def _config(**changes: Any) -> TrainingConfig:
    defaults: dict[str, Any] = {
        "predictor": "fixed",
        "keep_units": _KEEP,
        "stages": (StageConfig(1200, 0.5), StageConfig(1200, 0.1)),
        "batch_tokens": 384,
        "compute_dtype": "float32",
        "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        "data": DataConfig(max_tokens=64),
        "warm_start": WarmStartConfig(
            examples=40, held_out=8, steps=20, batch_size=16, learning_rate=3e-3
        ),
    }
    return TrainingConfig(**{**defaults, **changes})


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    return tiny_model(intermediate_size=128)


@pytest.fixture(scope="module")
def warm_folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    examples, config = _examples(), _config()
    ids = np.concatenate([step.examples for step in make_schedule(examples, config)])
    start = make_warm_start(
        model,
        examples,
        ids,
        {"ones": [[1, 2, 3], [9, 8]]},
        _KEEP,
        config.warm_start,
        0,
        lambda record: None,
    )
    folder = tmp_path_factory.mktemp("warm") / "start"
    start.save(folder)
    return folder


@pytest.fixture
def run(model: nn.Module, warm_folder: Path) -> Callable[..., Trainer]:
    """Return a function that makes a trainer."""

    def make(**options: Any) -> Trainer:
        changes = {k: v for k, v in options.items() if k not in ("report", "folder")}
        return Trainer(
            model,
            _examples(),
            _config(**changes),
            WarmStart.load(warm_folder),
            report=options.get("report", lambda record: None),
            checkpoint_folder=options.get("folder"),
        )

    return make


_MODES: dict[str, dict[str, Any]] = {
    "none": {"mask": "none"},
    "static": {"mask": "static"},
    "static_joint": {
        "mask": "static",
        "predictor": "joint",
        "joint": JointConfig(start_share=0.0, learning_rate=1e-2),
    },
    "fixed": {"mask": "ifp"},
    "joint": {
        "mask": "ifp",
        "predictor": "joint",
        "joint": JointConfig(start_share=0.0, mean_weight=0.5),  # machines exchange the mean
    },
    "hard_concrete": {
        "mask": "ifp",
        "predictor": "joint",
        "joint": JointConfig(start_share=0.0, relaxation="hard_concrete"),
    },
    "distillation": {"mask": "static", "distillation": DistillationConfig(0.5)},
    "full_distillation": {"mask": "ifp", "distillation": DistillationConfig(2.0)},
    "lora": {"mask": "static", "lora": LoRAConfig(rank=8, scale=4.0)},
}


def test_automatic_type_is_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = dataclasses.replace(_config(), compute_dtype="auto")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert training_dtype(auto) == mx.float32
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert training_dtype(auto) == mx.bfloat16
    assert training_dtype(_config()) == mx.float32


@pytest.mark.parametrize("mode", _MODES)
def test_loss_falls(mode: str, run: Callable[..., Trainer]) -> None:
    losses: list[float] = []
    trainer = run(report=lambda record: losses.append(record["loss"]), **_MODES[mode])
    trainer.run()
    assert losses[-1] < losses[0] - 0.1


def test_static_scores_are_trained_only_when_asked(run: Callable[..., Trainer]) -> None:
    fixed, joint = run(**_MODES["static"]), run(**_MODES["static_joint"])
    assert fixed.predictor is not None
    assert joint.predictor is not None
    start = np.array(fixed.predictor.head.prior)
    assert np.array_equal(np.array(joint.predictor.head.prior), start)
    fixed.run()
    joint.run()
    assert np.array_equal(np.array(fixed.predictor.head.prior), start)
    assert not np.array_equal(np.array(joint.predictor.head.prior), start)
    # Whatever the instruction, the scores are the same.
    features = mx.random.normal((3, joint.predictor.head.project.weight.shape[1]))
    scores = joint.predictor.head(features)
    assert mx.array_equal(scores[0], scores[1])
    assert mx.allclose(scores[0], standardised(joint.predictor.head.prior), atol=1e-5)


def test_warm_start_finds_more_of_the_top_units_than_the_prior(warm_folder: Path) -> None:
    agreement = WarmStart.load(warm_folder).agreement
    assert agreement["head@64"] > agreement["prior@64"] + 0.02


def test_frozen_weights_are_untouched(model: nn.Module, run: Callable[..., Trainer]) -> None:
    before = {
        name: np.array(value) for name, value in dict(tree_flatten(model.parameters())).items()
    }
    trainer = run(mask="ifp")
    head = np.array(trainer.predictor.head.expand.weight)  # type: ignore[union-attr]
    result = trainer.run()
    assert "model.embed_tokens.weight" not in result.weights
    for name, value in dict(tree_flatten(model.parameters())).items():
        assert np.array_equal(np.array(value), before[name])
    assert np.array_equal(np.array(result.head.expand.weight), head)  # type: ignore[union-attr]
    moved = result.weights["model.layers.0.mlp.up_proj.weight"]
    assert not np.array_equal(np.array(moved), before["model.layers.0.mlp.up_proj.weight"])


def test_lora_leaves_other_weights_alone(run: Callable[..., Trainer], model: nn.Module) -> None:
    result = run(**_MODES["lora"]).run()
    assert all(name.endswith("_proj.weight") for name in result.weights)
    base = dict(tree_flatten(model.parameters()))
    change = result.weights["model.layers.1.mlp.down_proj.weight"]
    change = change - base["model.layers.1.mlp.down_proj.weight"]
    rank = np.linalg.matrix_rank(np.array(change), tol=1e-5)
    assert 1 <= rank <= 8


@pytest.mark.parametrize("mode", ["fixed", "joint"])
def test_resumed_run_equals_an_uninterrupted_one(
    mode: str, run: Callable[..., Trainer], tmp_path: Path
) -> None:
    options = {**_MODES[mode], "checkpoint_every": 3}
    whole = run(**options).run()

    class Stopped(Exception):
        pass

    first = run(folder=tmp_path / "checkpoint", **options)
    original = first.checkpoint

    def checkpoint_and_stop() -> None:
        original()
        raise Stopped

    first.checkpoint = checkpoint_and_stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        first.run()
    second = run(folder=tmp_path / "checkpoint", **options).run(resume=True)
    for name, value in whole.weights.items():
        assert np.array_equal(np.array(value), np.array(second.weights[name])), name
    for name, value in dict(tree_flatten(whole.head.parameters())).items():  # type: ignore[union-attr]
        other = dict(tree_flatten(second.head.parameters()))[name]  # type: ignore[union-attr]
        assert np.array_equal(np.array(value), np.array(other)), name


def test_resuming_another_run_is_refused(run: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = run(mask="static", folder=tmp_path / "checkpoint")
    trainer.checkpoint()
    with pytest.raises(TrainingError, match="another configuration"):
        run(mask="static", seed=5, folder=tmp_path / "checkpoint").run(resume=True)
    with pytest.raises(TrainingError, match="no checkpoint to resume"):
        run(mask="static", folder=tmp_path / "none").run(resume=True)


def test_nan_stops_the_run_with_its_step(run: Callable[..., Trainer]) -> None:
    trainer = run(mask="static")
    train_step, calls = trainer.train_step, []

    def poisoned(step: Any) -> dict[str, Any]:
        calls.append(step)
        if len(calls) == 3:
            trainer.state.weights = trainer.state.weights * float("nan")
        return train_step(step)

    trainer.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="not a number at step 3"):
        trainer.run()


def test_micro_batches_equal_one_batch(run: Callable[..., Trainer]) -> None:
    options = {"mask": "ifp", "stages": (StageConfig(300, 0.2),)}
    whole = run(**options)
    parts = run(grad_accumulation_steps=2, **options)
    step = max(whole.steps, key=lambda step: len(step.examples))
    assert len(step.examples) > 2
    first, second = whole.train_step(step), parts.train_step(step)
    assert first["loss"].item() == pytest.approx(second["loss"].item(), rel=1e-4)
    assert first["grad_norm"].item() == pytest.approx(second["grad_norm"].item(), rel=1e-3)


def test_gradient_checkpointing_changes_nothing(run: Callable[..., Trainer]) -> None:
    plain, checkpointed = (
        run(**_MODES["joint"]),
        run(gradient_checkpointing=True, **_MODES["joint"]),
    )
    first, second = plain.train_step(plain.steps[0]), checkpointed.train_step(plain.steps[0])
    assert first["grad_norm"].item() == pytest.approx(second["grad_norm"].item(), rel=1e-4)


def test_masks_of_a_batch_equal_masks_one_at_a_time(run: Callable[..., Trainer]) -> None:
    trainer = run(mask="ifp")
    indices = np.arange(4)
    masks = top_k_mask(mx.random.normal((4, 3, 128)), 64)
    weights = np.full(4, 0.1)
    tensors = trainer.masked.cast(trainer.state.weights)
    together = trainer._loss(tensors, masks, make_batch(trainer.examples, indices, weights))
    alone = [
        trainer._loss(
            tensors, masks[i : i + 1], make_batch(trainer.examples, indices[i : i + 1], weights[:1])
        ).item()
        for i in range(4)
    ]
    assert together.item() == pytest.approx(sum(alone), rel=1e-4)


def test_model_and_mask_gradients_match_finite_differences(run: Callable[..., Trainer]) -> None:
    trainer = run(**_MODES["joint"])
    step = trainer.steps[0]
    batch = make_batch(trainer.examples, step.examples, np.full(len(step.examples), 0.02))
    masks = top_k_mask(mx.random.normal((len(step.examples), 3, 128)), 64)
    weights = trainer.state.weights
    _, (grads, mask_grads) = trainer._gradient(trainer.masked.cast(weights), masks, batch)
    flat = trainer.masked.layout.flatten(grads)
    direction = flat / mx.linalg.norm(flat)
    size = 1e-2

    def loss(weights: mx.array, masks: mx.array) -> float:
        return float(trainer._loss(trainer.masked.cast(weights), masks, batch))

    ahead, behind = loss(weights + size * direction, masks), loss(weights - size * direction, masks)
    expected = mx.linalg.norm(flat).item()
    assert (ahead - behind) / (2 * size) == pytest.approx(expected, rel=0.03)
    direction = mask_grads / mx.linalg.norm(mask_grads)
    ahead, behind = loss(weights, masks + size * direction), loss(weights, masks - size * direction)
    expected = mx.linalg.norm(mask_grads).item()
    assert (ahead - behind) / (2 * size) == pytest.approx(expected, rel=0.03)


def test_head_gradient_is_the_mask_gradient_through_the_soft_mask(warm_folder: Path) -> None:
    start = WarmStart.load(warm_folder)
    features = mx.array(np.array(start.features[:5]))
    trainer = PredictorTrainer(start.head, None, start.features[:8], 64, JointConfig(), 0)
    mask_gradient = mx.random.normal((5, 3, 128))
    flat, _ = trainer.step(features, mask_gradient, 64, 0, 0.0)
    direction = flat / mx.linalg.norm(flat)
    weights, size = trainer.state.weights, 1e-2

    def surrogate(weights: mx.array) -> float:
        trainer.layout.install(trainer.head, trainer.layout.split(weights))
        soft = soft_top_k(trainer.head(features), 64, JointConfig().eps_start)
        return float((mask_gradient * soft).sum())

    slope = (surrogate(weights + size * direction) - surrogate(weights - size * direction)) / (
        2 * size
    )
    assert slope == pytest.approx(mx.linalg.norm(flat).item(), rel=0.05)


def test_trainer_needs_a_warm_start_for_masks(model: nn.Module) -> None:
    with pytest.raises(TrainingError, match="needs a warm start"):
        Trainer(model, _examples(), _config(mask="static"))


_RANK_SCRIPT = Path(__file__).with_name("training_rank.py")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
def test_two_processes_equal_one(
    tmp_path: Path, warm_folder: Path, write_tiny_checkpoint: Callable[..., Path]
) -> None:
    import shutil

    write_tiny_checkpoint(tmp_path / "model", intermediate_size=128, vocab_size=67)
    _examples().save(tmp_path / "examples")
    shutil.copytree(warm_folder, tmp_path / "warm")
    config = _config(**_MODES["joint"], stages=(StageConfig(600, 0.2),))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    results = []
    for size in (1, 2):
        hosts = [[f"127.0.0.1:{_free_port()}"] for _ in range(size)]
        (tmp_path / "hosts.json").write_text(json.dumps(hosts))
        target = tmp_path / f"weights-{size}.safetensors"
        processes = []
        for rank in range(size):
            environment = dict(os.environ)
            if size > 1:
                environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(_RANK_SCRIPT), str(tmp_path), str(target)],
                    env=environment,
                    stderr=subprocess.PIPE,
                )
            )
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors.decode()
        loaded = mx.load(str(target))
        assert isinstance(loaded, dict)
        results.append(loaded)
    one, two = results
    for name in one:
        assert mx.allclose(one[name], two[name], atol=_ORDER_TOLERANCE), name


def test_masks_reach_the_wrapped_model(run: Callable[..., Trainer]) -> None:
    trainer = run(mask="static")
    model = trainer.model_for_evaluation()
    ids = mx.array([[3, 4, 5]])
    set_unit_masks(model, mx.zeros((3, 128)))
    nothing = model(ids)
    set_unit_masks(model, None)
    assert not mx.allclose(nothing, model(ids))


def test_distillation_learns_from_the_teacher_given(model: nn.Module, warm_folder: Path) -> None:
    config = _config(mask="none", distillation=DistillationConfig(1.0))
    start = WarmStart.load(warm_folder)
    other = clone_module(model)
    other.update(tree_map(lambda weight: 1.2 * weight, model.parameters()))
    losses = [
        Trainer(model, _examples(), config, start, teacher).train_step(
            make_schedule(_examples(), config)[0]
        )["loss"]
        for teacher in (None, model, other)
    ]
    # A model does not diverge from itself: only the cross-entropy is left.
    assert float(losses[0]) == float(losses[1])
    assert float(losses[2]) > float(losses[0]) + 1e-3
