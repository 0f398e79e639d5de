"""Saved tasks: what is said once holds wherever the name is given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def saved(ifp: Run) -> Run:
    """Return ``ifp`` with a saved task."""
    outcome = ifp(
        "task", "save", "py", "--task", "help me write Python", "--keep-units", "64",
        "--system-prompt", "be brief", "-m", "3", "--temp", "0.7",
    )  # fmt: skip
    assert outcome.code == 0
    assert 'saved py: "help me write Python", 64 units, system prompt "be brief"' in outcome.stderr
    return ifp


def test_list_tells_what_was_said_and_nothing_else(saved: Run) -> None:
    text = saved("task", "list").stdout
    for part in ("py", '"help me write Python"', "64 units", "max-tokens 3", "temp 0.7"):
        assert part in text
    assert "top-p" not in text
    (record,) = json.loads(saved("task", "list", "--json").stdout)
    assert record == {
        "name": "py",
        "task": "help me write Python",
        "keep_ratio": None,
        "keep_units": 64,
        "system_prompt": "be brief",
        "sampling": {"max_new_tokens": 3, "temperature": 0.7},
    }


def test_generate_takes_a_saved_task_whole(saved: Run, small_model: Path) -> None:
    named = saved("generate", "hello", "--model", small_model, "--task", "py", "--seed", "1")
    spelt_out = saved(
        "generate", "hello", "--model", small_model, "--task", "help me write Python",
        "--keep-units", "64", "--system-prompt", "be brief", "-m", "3", "--temp", "0.7",
        "--seed", "1",
    )  # fmt: skip
    assert named.code == 0
    assert named.stdout == spelt_out.stdout
    assert 'for "help me write Python"' in named.stderr


def test_what_is_given_beside_it_comes_first(saved: Run, word_model: Path) -> None:
    arguments = ("generate", "hello", "--model", word_model, "--task", "py", "--json")
    record = json.loads(saved(*arguments, "--keep-units", "128", "-m", "5", "--temp", "0").stdout)
    assert record["num_kept_units"] == 128
    assert record["generated_tokens"] == 5
    assert json.loads(saved(*arguments, "--dense").stdout)["selector"] == "dense"


def test_chat_takes_a_saved_task(saved: Run, word_model: Path, tmp_path: Path) -> None:
    arguments = ("chat", "--model", word_model, "--task", "py", "--session", "s", "--temp", "0")
    assert saved(*arguments, stdin="hello\n").stdout == "Alpha bravo **\n"
    session = (tmp_path / "home" / "sessions" / "s.jsonl").read_text()
    assert "be brief" in session
    assert "help me write Python" in session


def test_serve_takes_a_saved_task_by_name(saved: Run) -> None:
    from ifp_mlx.cli.serve import parse_tasks

    tasks = parse_tasks(["py", "mail=write e-mails"])
    assert tasks == {"py": "help me write Python", "mail": "write e-mails"}


def test_a_removed_task_is_a_description_again(saved: Run, word_model: Path) -> None:
    assert saved("task", "rm", "py").code == 0
    outcome = saved(
        "generate", "hello", "--model", word_model, "--task", "py", "--keep-units", "64"
    )
    assert 'for "py"' in outcome.stderr
    outcome = saved("task", "rm", "py")
    assert (outcome.code, outcome.stderr) == (
        2,
        "ifp: there is no preset 'py'; there are: none yet\n",
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["a b", "--task", "x"], "cannot be a preset's name"),
        (["../x", "--task", "x"], "cannot be a preset's name"),
        (["x", "--task", " "], "--task is empty"),
        (["x", "--task", "y", "--keep", "0.5", "--keep-units", "64"], "exclude each other"),
        (["x", "--task", "y", "--temp", "-1"], "--temp"),
    ],
)
def test_save_refuses_what_cannot_be(
    ifp: Run, tmp_path: Path, arguments: list[str], part: str
) -> None:
    outcome = ifp("task", "save", *arguments)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert part in outcome.stderr
    assert not (tmp_path / "home" / "presets").exists()


def test_a_damaged_file_is_one_line(saved: Run, word_model: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / "presets" / "py.json").write_text("{")
    outcome = saved("generate", "hello", "--model", word_model, "--task", "py")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "is damaged" in outcome.stderr
    assert "save py again" in outcome.stderr
