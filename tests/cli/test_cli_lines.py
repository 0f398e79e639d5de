"""Many prompts in one process: their order is kept, and a run that was stopped goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
QUESTIONS = ["hi", "Write a haiku about the sea.", "2+2", "def f(x): return", "ä ö ü?", "2+2"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Return a file of prompts, one of them twice, with a blank line."""
    path = tmp_path / "questions.txt"
    path.write_text("\n".join([*QUESTIONS[:3], "", *QUESTIONS[3:]]) + "\n")
    return path


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_lines_are_answered_as_they_are_alone(ifp: Run, small_model: Path, questions: Path) -> None:
    arguments = ("--model", small_model, "--task", "say words", "--keep-units", "64", "-m", "10")
    alone = [ifp("generate", question, *arguments).stdout for question in QUESTIONS]
    together = ifp("generate", "--lines", questions, *arguments, "--json")
    assert together.code == 0
    found = records(together.stdout)
    assert [record["prompt"] for record in found] == QUESTIONS
    assert [record["line"] for record in found] == [1, 2, 3, 5, 6, 7]
    assert [f"{record['answer']}\n" for record in found] == alone
    assert all(record["generated_tokens"] <= 10 for record in found)
    assert "6 answers in" in together.stderr


def test_lines_are_plain_lines_without_json(ifp: Run, word_model: Path, words: str) -> None:
    outcome = ifp("generate", "--lines", "-", "--model", word_model, stdin="hello\n\nagain\n")
    assert outcome.stdout == f"{words}\n{words}\n"


def test_lines_take_json_with_line_breaks_in_a_prompt(
    ifp: Run, word_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "two\\nlines"}\n{"messages": [{"role": "user", "content": "x"}]}\n')
    outcome = ifp("generate", "--lines", path, "--model", word_model, "--json", "-m", "2")
    assert [record["prompt"] for record in records(outcome.stdout)] == ["two\nlines", "x"]


def test_lines_without_a_task_are_the_whole_models(
    ifp: Run, small_model: Path, questions: Path
) -> None:
    arguments = ("generate", "--lines", questions, "--model", small_model, "-m", "4")
    assert ifp(*arguments).stdout == ifp(*arguments, "--dense").stdout


def test_each_line_selects_for_itself_if_an_amount_asks_for_it(
    ifp: Run, small_model: Path, questions: Path
) -> None:
    arguments = ("--model", small_model, "--keep-units", "64", "-m", "6")
    outcome = ifp("generate", "--lines", questions, *arguments, "--json")
    assert "answered one by one" in outcome.stderr
    alone = [ifp("generate", question, *arguments).stdout for question in QUESTIONS]
    assert [f"{record['answer']}\n" for record in records(outcome.stdout)] == alone


def test_a_prompt_that_is_too_long_is_told_and_the_others_are_answered(
    ifp: Run, short_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "questions.txt"
    path.write_text(f"hello\n{'x' * 3000}\nagain\n")
    outcome = ifp("generate", "--lines", path, "--model", short_model, "--json", "-m", "3")
    assert outcome.code == 1
    assert "1 prompt could not be answered" in outcome.stderr
    found = records(outcome.stdout)
    assert ["answer" in record for record in found] == [True, False, True]
    assert "the model's context is 256" in found[1]["error"]


def test_a_run_goes_on_where_it_was_stopped(
    ifp: Run, small_model: Path, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    arguments = ("generate", "--lines", questions, "--model", small_model, "--dense", "-m", "5")
    assert ifp(*arguments, "-o", output).stdout == ""
    whole = output.read_text()
    lines = whole.splitlines(keepends=True)
    output.write_text("".join(lines[:2]) + lines[2][:20])  # killed in the middle of a line
    outcome = ifp(*arguments, "-o", output)
    assert "holds 2 of 6 answers; going on" in outcome.stderr
    assert "4 answers in" in outcome.stderr
    assert output.read_text() == whole
    assert "0 answers in" in ifp(*arguments, "-o", output).stderr
    assert output.read_text() == whole


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"prompt": "another", "answer": "x"}\n', "answers to other prompts"),
        ("notes of mine\n", "holds something else"),
    ],
)
def test_a_file_that_holds_something_else_stays(
    ifp: Run, small_model: Path, questions: Path, tmp_path: Path, content: str, part: str
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text(content)
    outcome = ifp("generate", "--lines", questions, "--model", small_model, "-o", output)
    assert outcome.code == 2
    assert part in outcome.stderr
    assert output.read_text() == content


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["hello", "--lines", "x"], "--lines brings the prompts"),
        (["hello", "-o", "x"], "--output takes the answers of --lines"),
        (["--lines", "missing.txt"], "cannot read missing.txt"),
        (["--lines", "/dev/null"], "holds no prompt"),
        (["--lines", "x", "--prompt-cache-file", "y.safetensors"], "keeps one conversation"),
    ],
)
def test_lines_refuse_what_cannot_be(ifp: Run, arguments: list[str], part: str) -> None:
    outcome = ifp("generate", *arguments)
    assert (outcome.code, outcome.stdout) != (0, "")
    assert part in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_lines_fit_a_schema(ifp: Run, word_model: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}'
    )
    path = tmp_path / "questions.txt"
    path.write_text("one\ntwo\n")
    outcome = ifp("generate", "--lines", path, "--model", word_model, "--schema", schema, "--json")
    assert [json.loads(record["answer"])["a"] in (1, 2) for record in records(outcome.stdout)] == [
        True,
        True,
    ]


def test_ctrl_c_leaves_whole_lines(endless_model: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    path.write_text("hello\n" * 400)
    program = "from ifp_mlx.cli.app import main; main()"
    arguments = ["-o", str(output), "--model", str(endless_model), "-m", "60"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, "generate", "--lines", str(path), *arguments],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "IFP_HOME": str(tmp_path)},
    )
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    done = records(output.read_text())
    assert 0 < len(done) < 400
    assert {record["prompt"] for record in done} == {"hello"}
