"""Library messages name parameters; on the command line they name flags."""

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from ifp_mlx.cli.app import make_app
from ifp_mlx.cli.flag_names import FLAGS, in_flags
from ifp_mlx.cli.terminal import complain

ROOT = Path(__file__).parents[2]
IN_BACKQUOTES = re.compile(r"`([^`\s]+)`")
MARKDOWN = ROOT / "convert" / "model_card.py"
"""What it writes in backquotes is code in a README."""


def library_sources() -> Iterator[Path]:
    for path in [*(ROOT / "ifp_mlx").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]:
        if path.resolve().parent != ROOT / "cli" and path.resolve() != MARKDOWN:
            yield path


def strings(tree: ast.AST) -> Iterator[str]:
    """Yield every string of a module but those that stand alone: docstrings."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        yield from strings(node)


def named_parameters() -> set[str]:
    return {
        parameter
        for path in library_sources()
        for string in strings(ast.parse(path.read_text()))
        for parameter in IN_BACKQUOTES.findall(string)
    }


def flags_of(command: Any) -> set[str]:
    """Return the flags of a command and of those below it."""
    flags = {flag for parameter in command.params for flag in parameter.opts}
    for below in getattr(command, "commands", {}).values():
        flags |= flags_of(below)
    return flags


def test_every_parameter_that_a_message_names_has_a_flag() -> None:
    named = named_parameters()
    assert "keep_units" in named  # there is something to see
    assert named - FLAGS.keys() == set()


def test_no_flag_is_listed_for_a_parameter_that_nothing_names() -> None:
    assert FLAGS.keys() - named_parameters() == set()


def test_every_flag_is_one_of_a_command() -> None:
    assert set(FLAGS.values()) <= flags_of(typer.main.get_command(make_app()))


def test_other_backquotes_stay() -> None:
    assert in_flags("`keep_units` and `echo hi` and `nothing`") == (
        "--keep-units and `echo hi` and `nothing`"
    )


def test_an_error_is_printed_in_flags(capsys: pytest.CaptureFixture[str]) -> None:
    complain("`max_new_tokens` must be at least 1, not [0]")
    assert capsys.readouterr().err == "ifp: --max-tokens must be at least 1, not [0]\n"


def test_a_warning_is_printed_in_flags(capsys: pytest.CaptureFixture[str]) -> None:
    from ifp_mlx.cli.library_warnings import library_warnings_shown

    with library_warnings_shown():
        logging.getLogger("ifp_mlx.storage.files").warning("pass `overwrite` for %s", "x\ny")
    assert capsys.readouterr().err == "pass --force for x y\n"
