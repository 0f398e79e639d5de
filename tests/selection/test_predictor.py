"""The predictor reads an instruction and nothing else."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.errors import UsageError
from ifp_mlx.selection.predictor import (
    HEAD_TOKENS,
    TAIL_TOKENS,
    PredictorHead,
    SparsityPredictor,
    instruction_window,
)
from ifp_mlx.selection.reading import pad_right
from ifp_mlx.selection.top_k import standardised


@pytest.fixture
def predictor(tiny_model: Callable[..., nn.Module]) -> SparsityPredictor:
    head = PredictorHead(64, mx.random.normal((3, 192)), rank=8)
    head.expand.weight = 0.3 * mx.random.normal(head.expand.weight.shape)
    return SparsityPredictor(tiny_model(), head)


def test_untrained_head_is_the_prior() -> None:
    prior = mx.random.normal((3, 50))
    scores = PredictorHead(10, prior, rank=4)(mx.random.normal((2, 10)))
    assert scores.shape == (2, 3, 50)
    assert mx.allclose(scores[1], standardised(prior), atol=1e-5)


def test_padded_rows_score_as_alone(predictor: SparsityPredictor) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [1]]
    ids, lengths = pad_right(prompts)
    together = predictor.scores(ids, lengths)
    for row, prompt in zip(together, prompts, strict=True):
        assert mx.allclose(row, predictor.scores_of([prompt])[0], atol=1e-3)


def test_what_stands_in_the_padding_is_not_read(predictor: SparsityPredictor) -> None:
    lengths = mx.array([3], dtype=mx.int32)
    one = predictor.scores(mx.array([[4, 5, 6, 0, 0]]), lengths)
    other = predictor.scores(mx.array([[4, 5, 6, 33, 60]]), lengths)
    assert mx.allclose(one, other, atol=1e-4)


def test_scores_depend_on_the_instruction(predictor: SparsityPredictor) -> None:
    change = mx.abs(predictor.scores_of([[1, 2, 3]]) - predictor.scores_of([[40, 41, 42]])).max()
    assert float(change) > 0.1


def test_scores_are_standardised_per_layer(predictor: SparsityPredictor) -> None:
    scores = np.array(predictor.scores_of([[1, 2, 3]])[0])
    assert np.allclose(scores.mean(-1), 0, atol=1e-5)
    assert np.allclose(scores.std(-1), 1, atol=1e-4)


def test_window_keeps_both_ends_of_a_long_instruction() -> None:
    ids = list(range(2000))
    window = instruction_window(ids)
    assert window == ids[:HEAD_TOKENS] + ids[-TAIL_TOKENS:]
    assert instruction_window(ids[:512]) == ids[:512]


def test_window_refuses_an_empty_instruction() -> None:
    with pytest.raises(UsageError, match="at least one token"):
        instruction_window([])
