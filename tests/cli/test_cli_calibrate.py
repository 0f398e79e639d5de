import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifp_mlx.selection.calibration import Calibration

Run = Callable[..., Any]
RECORDS: list[dict[str, Any]] = [
    {"text": "some document"},
    {"prompt": "two plus two", "response": "four", "task": "sums"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_calibrate_makes_the_prior_that_selectors_use(
    ifp: Run, small_model: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "text.jsonl", RECORDS)
    outcome = ifp("calibrate", "--data", data, "--model", small_model, "--json")
    assert outcome.code == 0, outcome.stderr
    record = json.loads(outcome.stdout)
    assert record["tasks"] == ["sums"]
    calibration = Calibration.load(Path(record["path"]))
    assert calibration.num_tokens == record["num_tokens"] > 0
    arguments = ("generate", "hi", "--model", small_model, "--max-tokens", "2", "--keep", "0.67")
    assert "static:sums" in ifp(*arguments, "--selector", "static:sums").stderr
    assert ifp(*arguments).stderr.count("blend") == 1


def test_calibrate_takes_tasks_from_file_names(ifp: Run, small_model: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "letters.jsonl", [{"text": "abc def"}])
    two = tmp_path / "digits.jsonl.xz"
    two.write_bytes(lzma.compress(b'{"text": "1234 5678"}\n'))
    outcome = ifp(
        "calibrate", "--data", one, "--data", two, "--model", small_model, "--task-of-file",
        "-o", tmp_path / "made.safetensors",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    calibration = Calibration.load(tmp_path / "made.safetensors")
    assert set(calibration.tasks) == {"letters", "digits"}
    assert not mx.array_equal(calibration.tasks["letters"], calibration.tasks["digits"])


def test_calibrate_draws_the_same_examples_for_a_seed(
    ifp: Run, small_model: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "t.jsonl", [{"text": "word " * (n + 1)} for n in range(20)])

    def num_tokens(seed: str) -> int:
        target = tmp_path / f"{seed}.safetensors"
        arguments = ("--num-examples", "5", "--seed", seed, "-o", target, "--force", "--json")
        outcome = ifp("calibrate", "--data", data, "--model", small_model, *arguments)
        return int(json.loads(outcome.stdout)["num_tokens"])

    assert num_tokens("0") == num_tokens("0")
    assert len({num_tokens(str(seed)) for seed in range(4)}) > 1


def test_calibrate_cuts_long_examples(ifp: Run, small_model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "t.jsonl", [{"text": "x" * 300}, {"text": "y" * 300}])
    target = tmp_path / "c.safetensors"
    arguments = ("--max-length", "10", "-o", target, "--json")
    outcome = ifp("calibrate", "--data", data, "--model", small_model, *arguments)
    assert json.loads(outcome.stdout)["num_tokens"] == 20


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("not json", "t.jsonl:2: not JSON"),
        ('{"prompt": "x"}', "t.jsonl:2: field 'response' is missing"),
        ('{"text": "x", "task": 3}', "t.jsonl:2: field 'task' is not a name"),
    ],
)
def test_calibrate_names_the_bad_line(
    ifp: Run, small_model: Path, tmp_path: Path, line: str, part: str
) -> None:
    data = tmp_path / "t.jsonl"
    data.write_text(f'{{"text": "fine"}}\n{line}\n')
    outcome = ifp("calibrate", "--data", data, "--model", small_model)
    assert outcome.code == 1
    assert part in outcome.stderr
    assert not (small_model / "ifp").exists()
    skipped = ifp("calibrate", "--data", data, "--model", small_model, "--skip-bad-lines")
    assert skipped.code == 0
    assert "left out 1 line" in skipped.stderr


def test_calibrate_refuses_to_replace_without_force(
    ifp: Run, small_model: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "t.jsonl", RECORDS)
    assert ifp("calibrate", "--data", data, "--model", small_model).code == 0
    refused = ifp("calibrate", "--data", data, "--model", small_model)
    assert refused.code == 2
    assert "--force replaces it" in refused.stderr
    assert ifp("calibrate", "--data", data, "--model", small_model, "--force").code == 0


def test_calibrate_reports_missing_data(ifp: Run, small_model: Path, tmp_path: Path) -> None:
    outcome = ifp("calibrate", "--data", tmp_path / "no.jsonl", "--model", small_model)
    assert outcome.code == 1
    assert "no.jsonl cannot be read" in outcome.stderr
