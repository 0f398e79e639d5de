import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

_CONFIG = """
keep_units = [64]
batch_tokens = 512
compute_dtype = "float32"
[[stages]]
tokens = 900
[data]
max_tokens = 256
[warm_start]
examples = 12
held_out = 4
steps = 5
batch_size = 8
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt": f"add {n} to 1", "response": str(n + 1)}) for n in range(24)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(_CONFIG)
    return path


def test_train_makes_an_adapter_that_generate_uses(
    ifp: Run, small_model: Path, data: Path, config: Path, tmp_path: Path
) -> None:
    outcome = ifp(
        "train", "--config", config, "--model", small_model, "--data", data, "-o", tmp_path / "run",
        "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    record = json.loads(outcome.stdout)
    assert "tokens/s" in outcome.stderr
    assert (tmp_path / "run" / "curves.png").is_file()
    used = ifp(
        "generate", "add 3 to 1", "--model", small_model, "--adapter", record["adapter"],
        "--keep-units", "64", "-m", "2",
    )  # fmt: skip
    assert used.code == 0, used.stderr
    assert "predictor" in used.stderr


def test_train_distils_from_a_dense_run(
    ifp: Run, small_model: Path, data: Path, config: Path, tmp_path: Path
) -> None:
    common = ("--config", config, "--model", small_model, "--data", data, "--json")
    dense = ifp(
        "train", *common, "--mask", "none", "--learning-rate", "3e-3", "-o", tmp_path / "dense"
    )
    assert dense.code == 0, dense.stderr
    teacher = json.loads(dense.stdout)["adapter"]
    losses = {}
    for name, extra in {
        "alone": (),
        "base": ("--distillation", "2"),
        "taught": ("--distillation", "2", "--teacher", teacher),
    }.items():
        run = ifp("train", *common, "--mask", "static", *extra, "-o", tmp_path / name)
        assert run.code == 0, run.stderr
        losses[name] = json.loads(run.stdout)["loss"]
    assert len(set(losses.values())) == 3


def test_teacher_needs_a_weight(
    ifp: Run, small_model: Path, data: Path, config: Path, tmp_path: Path
) -> None:
    outcome = ifp(
        "train", "--config", config, "--model", small_model, "--data", data,
        "--teacher", tmp_path, "-o", tmp_path / "run",
    )  # fmt: skip
    assert outcome.code == 1
    assert "a teacher needs a weight" in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_missing_teacher_is_one_line(
    ifp: Run, small_model: Path, data: Path, config: Path, tmp_path: Path
) -> None:
    outcome = ifp(
        "train", "--config", config, "--model", small_model, "--data", data,
        "--teacher", tmp_path / "none", "--distillation", "1", "-o", tmp_path / "run",
    )  # fmt: skip
    assert outcome.code != 0
    assert "none" in outcome.stderr.splitlines()[-1]
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_train_refuses_a_folder_in_use(
    ifp: Run, small_model: Path, data: Path, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    outcome = ifp(
        "train", "--config", config, "--model", small_model, "--data", data, "-o", tmp_path / "run"
    )
    assert outcome.code == 2
    assert "is not empty" in outcome.stderr
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("mask", ["ifp", "none"])
def test_train_refuses_a_mixture_in_one_line(
    ifp: Run, write_tiny_checkpoint: Callable[..., Path], data: Path, config: Path,
    tmp_path: Path, mask: str,
) -> None:  # fmt: skip
    mixture = write_tiny_checkpoint(tmp_path / "mixture", "qwen3_moe")
    outcome = ifp(
        "train", "--config", config, "--model", mixture, "--data", data, "--mask", mask,
        "-o", tmp_path / "run",
    )  # fmt: skip
    assert outcome.code == 1
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("ifp: qwen3_moe models cannot be trained here: ")
    assert "ifp fit" in line
    assert not (tmp_path / "run").exists()
