"""Answers written together are those written alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ifp_mlx.assistant import Assistant
from ifp_mlx.errors import DataError
from ifp_mlx.fitting.answers import write_answer, write_answers
from ifp_mlx.slicing.compact import CutOptions

PROMPTS = [[3, 14, 15], [9, 26, 5, 35, 8, 9], [7, 9], [3, 2, 38, 4]]
LIMITS = [5, 1, 0, 8]


@pytest.mark.parametrize("tokens_together", [4096, 1])
def test_answers_together_are_those_alone(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tokens_together: int
) -> None:
    monkeypatch.setattr("ifp_mlx.fitting.answers._TOKENS_TOGETHER", tokens_together)
    assistant = Assistant.load(tiny_checkpoint(), options=CutOptions(context_tokens=64))
    model = assistant.dense().model
    seen: list[int] = []
    together = write_answers(model, assistant, PROMPTS, LIMITS, seen.append)
    alone = [
        write_answer(model, assistant, prompt, limit)[0] if limit else []
        for prompt, limit in zip(PROMPTS, LIMITS, strict=True)
    ]
    assert together == alone
    assert [len(answer) for answer in together] == LIMITS
    assert seen == [2, 3, 4]


def test_a_prompt_past_the_context_is_one_line(tiny_checkpoint: Callable[..., Path]) -> None:
    assistant = Assistant.load(tiny_checkpoint(), options=CutOptions(context_tokens=64))
    long = [3] * assistant.context_length
    with pytest.raises(DataError, match="the model's context is"):
        write_answers(assistant.dense().model, assistant, [long], [1])
