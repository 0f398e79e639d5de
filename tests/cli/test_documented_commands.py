"""Every command block of README and docs is run, or listed with the reason why not.

``docs/run_commands.py`` runs them all, as a reader would; here those run that take no shell and no
time, with a tiny model under the name of the default one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import workplace
from documented_commands import NOT_RUN, ROOT, SMALLER, Command, commands, pages, unmarked

COMMANDS = [command for page in pages() for command in commands(page)]
NOT_QUICK = {
    "ifp serve": "stays until it is stopped",
    "ifp fit": "takes seconds",
    "ifp train": "takes seconds",
    "ifp bench": "takes minutes",
    "ifp doctor": "measures",
    "ifp pull": "needs a package index",
    "predictor": "needs an adapter",
    "--adapter": "needs an adapter",
    "static": "needs a calibration",
    "blend@": "needs a calibration",
    "eval --data FOLDER": "needs an adapter",
    "eval --overlap": "needs an adapter",
    "wheel/": "needs a package index",
}
"""Parts of commands, and what keeps those that have them from being run here."""


def is_quick(command: Command) -> bool:
    return (
        command.reason_not_to_run is None
        and command.words is not None
        and command.words[0] == "ifp"
        and not any(part in command.text for part in NOT_QUICK)
    )


QUICK = sorted({command.page for command in COMMANDS if is_quick(command)})


def test_blocks_of_commands_say_so() -> None:
    """Only blocks marked sh, console or python are looked into."""
    found = {page.relative_to(ROOT).as_posix(): unmarked(page) for page in pages()}
    assert {page: lines for page, lines in found.items() if lines} == {}
    assert len(COMMANDS) > 80  # there is something to see


def test_an_unmarked_command_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```\nwords\n```\n\n```\n$ ifp chat --task x\n```\n")
    assert unmarked(page) == ["$ ifp c"]


def test_lists_of_commands_name_some_that_are_there() -> None:
    texts = {command.text for command in COMMANDS}
    listed = [text for reason in NOT_RUN.values() for text in reason]
    assert len(listed) == len(set(listed))
    assert set(listed) <= texts
    assert set(SMALLER) <= texts
    assert set(listed).isdisjoint(SMALLER)
    assert [part for part in NOT_QUICK if not any(part in text for text in texts)] == []


@pytest.mark.parametrize("page", QUICK)
def test_quick_commands_of_a_page_run(
    page: str, tmp_path: Path, ifp: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    workplace.add_files(folder)
    workplace.add_models(tmp_path / "home", folder / "MODEL")
    monkeypatch.chdir(folder)
    for command in COMMANDS:
        if command.page != page or not is_quick(command) or command.words is None:
            continue
        outcome = ifp(*command.words[1:], stdin="hi\n" if "chat" in command.text else None)
        assert outcome.code == 0, f"{command.text}\n{outcome.stderr}"
        assert "is now called" not in outcome.stderr
