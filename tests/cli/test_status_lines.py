"""Status lines fit the terminal: what matters least is left out first."""

from typing import Any

import pytest

from ifp_mlx.chat.generation import GenerationStats
from ifp_mlx.cli.statistics_line import chat_status, full_statistics, turn_statistics
from ifp_mlx.cli.terminal import broken_between_facts
from ifp_mlx.slicing.compact import ModelSize
from ifp_mlx.subnets.subnetwork import DENSE, SubNetwork
from ifp_mlx.units.families import find_family

STATS = GenerationStats(
    prompt_tokens=12_345,
    cached_prompt_tokens=0,
    prompt_tps=100.0,
    generated_tokens=1024,
    generation_tps=112.3,
    time_to_first_token_s=120.3,
    peak_memory_bytes=10**9,
    finish_reason="length",
)
TASK = "help me write Python for people who come from other languages and know little of it"


def whole_model(**facts: Any) -> SubNetwork:
    size = ModelSize(parameters=1000, num_bytes=4000)
    return SubNetwork(
        model=None,  # type: ignore[arg-type]
        selection=None,
        selector=DENSE,
        task=None,
        kind=find_family("llama").kind,
        num_kept_units=192,
        num_units=192,
        size=size,
        source=size,
        **facts,
    )


@pytest.mark.parametrize("width", [200, 80, 60, 40])
def test_the_line_below_a_reply_fits(width: int) -> None:
    line = turn_statistics(STATS, 131_072, 131_072, width)
    assert len(line) <= max(width, 52)
    assert line.startswith("1024 tokens (cut at --max-tokens) · 112.3 tok/s")
    assert ("first after" in line) == (width == 200)
    assert ("131,072/131,072" in line) == (width >= 80)


@pytest.mark.parametrize("width", [200, 80, 60, 40])
@pytest.mark.parametrize("task", [None, "say words", TASK])
def test_the_line_at_the_bottom_fits(width: int, task: str | None) -> None:
    line = chat_status(whole_model(), task, "smollm2-135m", 12_000, 131_072, width)
    assert len(line) <= width
    assert "12,000/131,072" in line
    assert "whole model" in line
    if task == "say words" and width >= 60:
        assert task in line
    if task == TASK and 80 > width >= 60:
        assert "help" in line
        assert "…" in line


@pytest.mark.parametrize("width", [100, 80, 40])
def test_status_lines_break_between_facts(width: int) -> None:
    message = (
        'selected 768 of 1536 FFN units for "help me write Python": 379 of 538 MB, predictor, '
        "selected in 3.3 s, sliced in 6.6 s\nclose to another"
    )
    broken = broken_between_facts(message, width)
    assert broken.replace("\n", " ") == message.replace("\n", " ")
    *lines, last = broken.split("\n")
    assert last == "close to another"
    assert all(line[-1] in ",:" for line in lines[:-1])
    assert all(len(line) <= width for line in lines[1:])
    assert len(lines[0]) <= max(width, 58)


def test_a_prompt_that_is_too_short_to_select_by_is_told_with_the_statistics() -> None:
    text = full_statistics(whole_model(prompt_too_short=True), STATS)
    assert "selecting a part for this prompt would take longer than it saves" in text
    assert "too" not in full_statistics(whole_model(), STATS)
