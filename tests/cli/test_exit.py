"""Every command ends with its exit code, never with an abort of the interpreter.

mlx ends a process with "terminate called without an active exception", exit code 134, if a thread
that has drawn random numbers is gone before the interpreter is: in a quarter to all of the runs,
where such a thread there is.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

NUM_RUNS = 6
MAIN = "from ifp_mlx.cli.app import main; main()"


def ends_of(program: str, *arguments: str | Path, home: Path) -> list[tuple[int, str]]:
    """Return exit code and standard error of several runs, two at a time."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "IFP_HOME": str(home)}
    ends = []
    for _ in range(NUM_RUNS // 2):
        running = [
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                text=True,
            )
            for _ in range(2)
        ]
        for process in running:
            _, errors = process.communicate(timeout=120)
            ends.append((process.returncode, errors))
    return ends


@pytest.mark.slow
def test_a_wrong_flag_exits_2(word_model: Path, tmp_path: Path) -> None:
    arguments = ("generate", "hi", "--selector", "blen", "--model", word_model)
    for code, errors in ends_of(MAIN, *arguments, home=tmp_path):
        assert (code, errors.count("\n")) == (2, 1), errors
        assert errors.startswith("ifp: no selector 'blen'")


@pytest.mark.slow
def test_a_refused_checkpoint_exits_1(
    write_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_tiny_checkpoint(tmp_path / "cut-off")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = ("generate", "hi", "--model", folder)
    for code, errors in ends_of(MAIN, *arguments, home=tmp_path):
        assert (code, errors.count("\n")) == (1, 1), errors
        assert "model.safetensors" in errors


@pytest.mark.slow
def test_random_state_of_a_thread_that_has_ended_does_not_matter(tmp_path: Path) -> None:
    leaves_state = (
        "import threading, mlx.core as mx\n"
        "states = []\n"
        "thread = threading.Thread(target=lambda: states.append(mx.random.state))\n"
        "thread.start(); thread.join()\n"
    )
    for end in ends_of(leaves_state + MAIN, "--version", home=tmp_path):
        assert end == (0, "")


def test_what_is_registered_for_the_end_is_done(tmp_path: Path) -> None:
    registers = "import atexit, sys; atexit.register(print, 'done', file=sys.stderr)\n"
    for end in ends_of(registers + MAIN, "--version", home=tmp_path)[:1]:
        assert end == (0, "done\n")


def test_a_fault_of_ours_is_shown_whole(tmp_path: Path) -> None:
    breaks = "import ifp_mlx.cli.app as app\napp.run = lambda: 1 / 0\napp.main()"
    for code, errors in ends_of(breaks, home=tmp_path)[:1]:
        assert code == 1
        assert errors.startswith("Traceback")
        assert errors.endswith("ZeroDivisionError: division by zero\n")
