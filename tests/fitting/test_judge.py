"""The user's own check: what it gets, what its exit status means, and what goes wrong with it."""

import sys

import pytest

from ifp_mlx.errors import UsageError
from ifp_mlx.fitting.judge import CommandJudge
from ifp_mlx.text.task_examples import TaskExample

EXAMPLE = TaskExample("2 + 2?", "4")


def python(code: str) -> str:
    return f"{sys.executable} -c '{code}'"


@pytest.mark.parametrize(("answer", "verdict"), [("It is 4.", True), ("It is 5.", False)])
def test_exit_status_is_the_verdict(answer: str, verdict: bool) -> None:
    code = 'import json, sys; r = json.load(sys.stdin); sys.exit(r["expected"] not in r["answer"])'
    assert CommandJudge(python(code)).is_right(EXAMPLE, answer) is verdict


def test_flooded_output_is_thrown_away() -> None:
    assert CommandJudge(python('print("x" * 50_000_000)')).is_right(EXAMPLE, "4")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "is empty"),
        ("python 'open", "`check`"),
        ("/no/such/judge", "cannot be run"),
        (python("import os; os.abort()"), "crashed"),
        (python("import time; time.sleep(60)"), "took longer than 0.5 s"),
    ],
)
def test_a_judge_that_cannot_judge_is_one_line(command: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CommandJudge(command, seconds=0.5).is_right(EXAMPLE, "4")
