"""``ifp fit``: a table, a recommendation, and the task's own setting."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ifp_mlx.fitting.candidates import Candidate
from ifp_mlx.storage.home import task_settings_folder

Run = Callable[..., Any]
TASK = ("--task", "say the alphabet")


@pytest.fixture
def fit(
    ifp: Run, word_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Run ``ifp fit`` on four examples, with three candidates."""
    found = [Candidate(192), Candidate(128), Candidate(128, 4)]
    monkeypatch.setattr("ifp_mlx.fitting.measure.candidates", lambda *_, **__: iter(found))
    examples = tmp_path / "examples.txt"
    examples.write_text("say it\nonce more\nand again\nthe last time\n")

    def run(*arguments: str) -> Any:
        return ifp(
            "fit", "--model", word_model, *TASK, "--examples", examples, "-m", "6", *arguments
        )

    return run


def test_fit_prints_a_table_of_80_columns_and_recommends(fit: Run) -> None:
    outcome = fit("--check", f'{sys.executable} -c "pass"')
    assert outcome.code == 0
    *lines, sentence = outcome.stdout.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == [
        "keeps", "bits", "memory", "disk", "changed", "same", "tok/s", "first", "right",
    ]  # fmt: skip
    assert any(line.split()[-1] == "2/2" for line in lines)
    assert sentence.startswith("Recommended: ")
    assert "2 examples select, 2 measure; 3 candidates" in outcome.stderr


def test_fit_draws_and_prints_json(fit: Run, tmp_path: Path) -> None:
    outcome = fit("--json", "--picture", str(tmp_path / "fit.png"))
    document = json.loads(outcome.stdout)
    assert [row["key"] for row in document["rows"]][:2] == ["192@source", "128@source"]
    assert document["rows"][0]["fidelity"]["changed"] == 0
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_what_fit_found_is_used_for_the_task(
    fit: Run, ifp: Run, word_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifp_mlx.fitting.results.MOST_CHANGED", 100.0)
    two = [Candidate(192), Candidate(128)]
    monkeypatch.setattr("ifp_mlx.fitting.measure.candidates", lambda *_, **__: iter(two))
    outcome = fit("--use")
    assert outcome.code == 0
    assert '"say the alphabet" now uses 67% of the FFN units' in outcome.stderr
    answer = ifp("generate", "hello", "--model", word_model, *TASK, "-m", "6")
    assert "cache hit" in answer.stderr
    assert "128 of 192 FFN units" in answer.stderr
    assert "not measured" not in answer.stderr


def test_what_was_found_fit_to_read_is_not_fit_to_write(
    fit: Run, ifp: Run, word_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifp_mlx.fitting.results.MOST_CHANGED", 100.0)
    two = [Candidate(192), Candidate(128)]
    monkeypatch.setattr("ifp_mlx.fitting.measure.candidates", lambda *_, **__: iter(two))
    assert fit("--use").code == 0
    (path,) = task_settings_folder().glob("*.json")
    content = json.loads(path.read_text())
    content["setting"]["only_reads"] = True
    path.write_text(json.dumps(content))
    words = ("generate", "hello", "--model", word_model, *TASK, "--keep", "0.67", "-m", "2")
    assert "not measured" not in ifp(*words, "--read-with", "part").stderr
    assert "not measured for this task" in ifp(*words, "--read-with", "whole").stderr


def test_a_budget_below_anything_recommends_nothing(fit: Run) -> None:
    outcome = fit("--memory", "0.000001GB", "--use")
    assert outcome.code == 2
    assert "Nothing that fits in" in outcome.stdout
    assert "nothing is recommended, so there is nothing to use" in outcome.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no example"), ("only one\n", "at least two"), ("twice\ntwice\n", "at least two")],
)
def test_examples_that_cannot_measure_are_refused(
    ifp: Run, word_model: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "few.txt").write_text(content)
    outcome = ifp("fit", "--model", word_model, *TASK, "--examples", tmp_path / "few.txt")
    assert outcome.code in (1, 2)
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_judge_that_crashes_is_one_line(fit: Run) -> None:
    outcome = fit("--check", f'{sys.executable} -c "import os; os.abort()"')
    assert outcome.code == 2
    assert "crashed" in outcome.stderr.splitlines()[-1]
    assert "Traceback" not in outcome.stderr


def test_what_is_not_known_is_said_until_fit_measured_it(
    fit: Run, ifp: Run, word_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An amount that nobody measured, and a calibration that would help."""
    words = ("generate", "hello", "--model", word_model, *TASK, "--keep", "0.67", "-m", "2")
    before = ifp(*words).stderr
    assert "67% of the FFN units: not measured for this task" in before
    assert before.count("ifp calibrate, once, makes better picks") == 1
    monkeypatch.setattr("ifp_mlx.fitting.results.MOST_CHANGED", 100.0)
    two = [Candidate(192), Candidate(128)]
    monkeypatch.setattr("ifp_mlx.fitting.measure.candidates", lambda *_, **__: iter(two))
    assert fit("--use").code == 0
    after = ifp(*words).stderr
    assert "128 of 192 FFN units" in after
    assert "not measured" not in after
    assert "ifp calibrate" not in after
    whole = ifp("generate", "hello", "--model", word_model, "--task", "other", "--keep", "1")
    assert "ifp calibrate" not in whole.stderr
