"""Defaults that fit the data, and examples that tell before from after."""

import dataclasses

import numpy as np
import pytest

from ifp_mlx.errors import DataError
from ifp_mlx.text.examples import ExampleSet
from ifp_mlx.training.config import DataConfig, OptimizerConfig, StageConfig, TrainingConfig
from ifp_mlx.training.defaults import LEAST_STEPS, MOST_TOKENS, divide, settled
from ifp_mlx.training.schedule import make_schedule


def examples(count: int, length: int = 60, documents: tuple[str, ...] = ()) -> ExampleSet:
    """Return examples of two domains, all different."""
    rng = np.random.default_rng(0)
    ends = np.arange(1, count + 1) * length
    return ExampleSet(
        tokens=rng.integers(0, 999, count * length).astype(np.uint16),
        is_target=np.tile(np.arange(length) >= length // 2, count),
        spans=np.stack([ends - length, ends], axis=1),
        sources=np.stack([ends - length, ends - length // 2], axis=1),
        domains=(np.arange(count) % 2).astype(np.int16),
        domain_names=("mail", "prose"),
        document_domains=documents,
    )


def test_fifty_lines_make_small_steps_and_a_few_passes() -> None:
    config = settled(TrainingConfig(), examples(50), 768)
    assert config.keep_units == (768,)
    assert config.stages == (StageConfig(3 * 50 * 60, 0.0),)
    assert config.batch_tokens == config.data.max_tokens == 512
    steps = make_schedule(examples(50), config)
    assert config.optimizer.warmup_steps <= len(steps) // 10


def test_more_text_makes_larger_steps_up_to_a_limit() -> None:
    config = settled(TrainingConfig(), examples(10_000), 768)
    assert config.stages[0].tokens == MOST_TOKENS
    assert config.batch_tokens == 16384
    assert config.optimizer.warmup_steps == min(50, MOST_TOKENS // 16384 // 10)
    medium = settled(TrainingConfig(), examples(500), 768)
    assert 512 < medium.batch_tokens < 16384
    assert len(make_schedule(examples(500), medium)) >= LEAST_STEPS


@pytest.mark.parametrize(
    ("documents", "share"), [((), 0.0), (("prose",), 0.2), (("mail", "prose"), 1.0)]
)
def test_kinds_of_text_share_a_run(documents: tuple[str, ...], share: float) -> None:
    config = settled(TrainingConfig(), examples(50, documents=documents), 768)
    assert config.stages[0].document_share == share


def test_what_a_configuration_says_stays() -> None:
    said = TrainingConfig(
        keep_units=(64, 128),
        stages=(StageConfig(1200),),
        batch_tokens=1024,
        optimizer=OptimizerConfig(warmup_steps=40),
        data=DataConfig(max_tokens=256),
    )
    assert settled(said, examples(50), 768) == said


def test_held_out_examples_are_not_trained_on() -> None:
    whole = examples(50)
    # The same text again, under another number.
    whole = dataclasses.replace(
        whole,
        spans=np.concatenate([whole.spans, whole.spans]),
        sources=np.concatenate([whole.sources, whole.sources]),
        domains=np.concatenate([whole.domains, whole.domains]),
    )
    training, held_out = divide(whole, 0.1)
    seen = {training.example(i)[0].tobytes() for i in range(len(training))}
    kept = {held_out.example(i)[0].tobytes() for i in range(len(held_out))}
    assert not seen & kept
    assert (len(kept), len(held_out), len(seen)) == (4, 4, 46)  # each once, of both domains
    assert {int(domain) for domain in held_out.domains} == {0, 1}


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (3, 1), (4, 2)])
def test_few_examples_are_divided_too(count: int, held_out: int) -> None:
    found = divide(examples(count), 0.1)
    assert [len(part) for part in found] == [count - held_out, held_out]


def test_one_example_cannot_do_both() -> None:
    with pytest.raises(DataError, match="give at least two"):
        divide(examples(1), 0.1)
