"""While a long prompt is read, a terminal shows how far; Ctrl-C stops it."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from ifp_mlx.cli.prompt_progress import reading_line

OpenTerminal = Callable[..., AbstractContextManager[Any]]
NUM_WORDS = 12_000


@pytest.mark.parametrize(
    ("done", "passed_s", "left"), [(500, 1.0, "3 s"), (100, 10.0, "3 min"), (20, 60.0, "99 min")]
)
def test_the_time_left_is_that_of_the_speed_so_far(done: int, passed_s: float, left: str) -> None:
    line = reading_line(done, 2000, passed_s)
    assert line == f"reading the prompt: {done:,} of 2,000 tokens, {left} left"


def test_a_terminal_shows_how_much_is_read_and_ctrl_c_stops(
    open_ifp: OpenTerminal, endless_model: Path
) -> None:
    prompt = "Alpha " * NUM_WORDS
    with open_ifp("generate", prompt, "--model", endless_model, "--dense", "-m", "30") as screen:
        screen.wait_for("reading the prompt:")
        screen.press("Ctrl-C")
        start = time.monotonic()
        assert screen.wait_for_end() == 130
        # Half a second a piece, and the end of the process; machines that test are busy.
        assert time.monotonic() - start < 10
        assert "bravo" not in screen.text()
        assert "Traceback" not in screen.text()


def test_a_chat_goes_on_after_reading_was_stopped(
    open_ifp: OpenTerminal, endless_model: Path
) -> None:
    arguments = ("chat", "--model", endless_model, "--dense", "-m", "3")
    with open_ifp(*arguments) as screen:
        screen.wait_for_prompt()
        screen.paste("Alpha " * NUM_WORDS)
        screen.press("Enter")
        screen.wait_for("reading the prompt:")
        screen.press("Ctrl-C")
        screen.wait_for_prompt()
        screen.press("hello", "Enter")
        screen.wait_for("Alpha bravo")
        screen.wait_for("tok/s")
