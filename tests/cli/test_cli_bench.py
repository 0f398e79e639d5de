import json
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., Any]
TINY = ("bench", "latency", "--shape", "tiny", "--predictor-config", "tiny", "--json")


def test_quick_is_short_but_for_what_is_said(ifp: Run) -> None:
    content = json.loads(ifp(*TINY, "--quick").stdout)
    assert {row["prompt_tokens"] for row in content["rows"]} == {64}
    assert {row["new_tokens"] for row in content["rows"]} == {8}
    assert (content["repeats"], content["warmups"], content["decode_repeats"]) == (2, 1, 2)
    asked = ("--prompt", "20", "--new-tokens", "2", "--repeats", "1", "--dtype", "float16")
    content = json.loads(ifp(*TINY, "--quick", *asked).stdout)
    assert {row["prompt_tokens"] for row in content["rows"]} == {20}
    assert {row["new_tokens"] for row in content["rows"]} == {2}
    assert (content["repeats"], content["dtype"]) == (1, "float16")


def test_every_measurement_is_told(ifp: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        "ifp_mlx.cli.bench.measuring",
        lambda: contextlib.nullcontext(lambda *turn: told.append(turn)),
    )
    outcome = ifp(*TINY, "--quick", "--new-tokens", "2", "--prompt", "12")
    assert outcome.code == 0
    reading = [turn for turn in told if "writing" not in turn[0]]
    writing = [turn for turn in told if "writing" in turn[0]]
    assert [done for _, done, _ in reading] == list(range(1, reading[0][2] + 1))
    assert len(reading) == 3 * 8  # a warm-up and two repeats of six rows and two stages
    assert [done for _, done, _ in writing] == list(range(1, 2 * 3 + 1))
