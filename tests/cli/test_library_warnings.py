"""What the library logs is one line on standard error, once, and no other logger is touched."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ifp_mlx.cli.library_warnings import library_warnings_shown

Run = Callable[..., Any]
LIBRARY = logging.getLogger("ifp_mlx.subnets.task_cache")


def test_a_warning_is_one_line_even_where_the_root_logger_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [*root.handlers, logging.StreamHandler()])
    with library_warnings_shown():
        LIBRARY.warning("moved %s aside", "x.safetensors")
    assert capsys.readouterr().err == "moved x.safetensors aside\n"


def test_what_is_no_warning_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with library_warnings_shown():
        LIBRARY.info("read %s", "x.safetensors")
    assert capsys.readouterr().err == ""


def test_afterwards_all_is_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("ifp_mlx")
    before = (list(library.handlers), library.propagate, library.level)
    with library_warnings_shown():
        pass
    assert (library.handlers, library.propagate, library.level) == before
    LIBRARY.warning("heard by others")
    assert caplog.messages == ["heard by others"]


def test_other_loggers_are_not_touched(caplog: pytest.LogCaptureFixture) -> None:
    with library_warnings_shown():
        logging.getLogger("transformers").warning("of another library")
    assert caplog.messages == ["of another library"]


def test_a_command_shows_each_warning_once_in_every_run(
    ifp: Run, small_model: Path, tmp_path: Path
) -> None:
    arguments = ("generate", "hi", "--model", small_model, "--task", "write words",
                 "-m", "1", "--keep", "0.67")  # fmt: skip
    assert ifp(*arguments).code == 0
    for _ in range(2):
        (entry,) = (tmp_path / "home" / "subnets").glob("*.safetensors")
        entry.write_bytes(entry.read_bytes()[:-40])
        outcome = ifp(*arguments)
        assert outcome.code == 0
        assert outcome.stderr.count("moved a damaged cache entry") == 1
