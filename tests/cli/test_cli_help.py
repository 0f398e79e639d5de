"""The first words that a newcomer types lead somewhere; help is whole sentences in sections."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from ifp_mlx.cli.app import make_app
from ifp_mlx.cli.help_sections import split_examples

Run = Callable[..., Any]


def commands(command: Any, path: str = "ifp") -> Iterator[tuple[str, Any]]:
    """Yield every command and group, hidden ones as well."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{path} {name}")


ALL = dict(commands(typer.main.get_command(make_app())))


@pytest.mark.parametrize("words", [[], ["cache"], ["bench"], ["models"]], ids=" ".join)
def test_a_bare_group_prints_its_help(ifp: Run, words: list[str]) -> None:
    bare, asked = ifp(*words), ifp(*words, "--help")
    assert (bare.code, bare.stderr) == (2, "")
    assert bare.stdout == asked.stdout
    assert len(bare.stdout.splitlines()) > 8


def test_the_help_shows_commands_in_sections_and_no_former_name(ifp: Run) -> None:
    text = ifp("--help").stdout
    headings = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == ["Options:", "First steps:", "Tasks:", "Models:", "For developers:"]
    names = set(re.findall(r"^  ([a-z]+)  ", text, re.MULTILINE))
    assert {"chat", "generate", "models", "bench"} <= names
    assert not {"tasks", "prepare", "overlap"} & names
    assert "..." not in text.partition("\n")[2]  # first sentences are whole


def test_help_of_a_command_is_its_help(ifp: Run) -> None:
    assert ifp("help").stdout == ifp("--help").stdout
    asked = ifp("help", "cache", "list")
    assert (asked.code, asked.stdout) == (0, ifp("cache", "list", "--help").stdout)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["list"], "ifp models list"),
        (["ls"], "ifp models list"),
        (["run", "smollm2-135m"], "ifp chat --model MODEL"),
        (["modles"], "Did you mean models?"),
        (["xyzzy"], "ifp --help lists them"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_programs_words_lead_somewhere(ifp: Run, words: list[str], part: str) -> None:
    outcome = ifp(*words)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert part in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_former_names_work_and_say_the_new_one(ifp: Run, small_model: Path) -> None:
    outcome = ifp("tasks", "--json")
    assert (outcome.code, json.loads(outcome.stdout)) == (0, [])
    assert outcome.stderr == "ifp tasks is now called ifp cache list --tree\n"
    outcome = ifp("prepare", "--model", small_model)
    assert outcome.code == 0
    assert "now called ifp convert MODEL --unit-major" in outcome.stderr
    assert (small_model / "ifp" / "units.safetensors").is_file()


def test_convert_stores_the_units_of_a_model_that_is_there(ifp: Run, small_model: Path) -> None:
    outcome = ifp("convert", small_model, "--unit-major", "--json")
    assert json.loads(outcome.stdout)["path"] == str(small_model / "ifp" / "units.safetensors")
    outcome = ifp("convert", small_model)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "name it with --output" in outcome.stderr


@pytest.mark.parametrize("path", [path for path in ALL if path.count(" ")])
def test_every_option_is_explained_in_words(path: str) -> None:
    command = ALL[path]
    assert command.help
    for parameter in command.params:
        text = parameter.help or ""
        assert text[:1].isupper() or text[:1].isdigit() or text.split()[0].islower(), parameter.name
        assert len(text) > 10, parameter.name
        assert "stdout" not in text, parameter.name
        assert "stderr" not in text, parameter.name


def test_chat_shows_what_a_newcomer_needs_first(ifp: Run) -> None:
    lines = ifp("chat", "--help").stdout.splitlines()
    headings = [line for line in lines if line.endswith(":") and line[:1] not in ("", " ")]
    assert headings == [
        "Examples:",
        "Options:",
        "Which part of the model:",
        "How answers are drawn:",
        "Advanced:",
    ]
    first = "\n".join(lines[: lines.index("Which part of the model:")])
    assert "--task" in first
    assert "--model" in first
    assert "--exact-down" not in first


def test_examples_are_lines_of_their_own() -> None:
    text, examples = split_examples("Do it.\n\nMore.\n\nExamples: ifp a\n  b;\nifp c")
    assert (text, examples) == ("Do it.\n\nMore.", ["ifp a b", "ifp c"])
    assert split_examples("Do it.\n\nMore.") == ("Do it.\n\nMore.", [])
