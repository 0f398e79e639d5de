import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ifp_mlx.adapters.adapter import load_adapter

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
    assert "the adapter was trained for" not in used.stderr
    manifest = Path(record["adapter"]) / "adapter.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"keep_units": [128]}))
    cut_more = ifp(
        "generate", "add 3 to 1", "--model", small_model, "--adapter", record["adapter"],
        "--keep-units", "64", "-m", "2",
    )  # fmt: skip
    assert "64 FFN units: the adapter was trained for 128 and more" in cut_more.stderr


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


def capped(*arguments: object, home: Path, limit_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run ``ifp`` in a process that gets no more memory than a machine of that size has."""
    code = (
        "import resource, sys; from ifp_mlx.cli.app import main\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({limit_bytes}, {limit_bytes}))\n"
        "main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=home,
        env={**os.environ, "IFP_HOME": str(home), "IFP_NO_OPENBLAS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def write_lines(path: Path, count: int = 50) -> Path:
    """Write lines of several lengths, all different."""
    rows = [
        {"prompt": f"say {n} words", "response": " ".join(["word"] * (n % 7 + 1)) + f" {n}"}
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_fifty_lines_train_on_8_gb_with_no_other_flag(
    write_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Nothing is asked for but the data; the model is the default one."""
    (tmp_path / "models").mkdir()
    write_tiny_checkpoint(tmp_path / "models" / "smollm2-135m")
    lines = write_lines(tmp_path / "fifty-lines.jsonl")
    outcome = capped("train", "--data", lines, home=tmp_path, limit_bytes=8 * 10**9)
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "runs" / "fifty-lines" / "adapter" / "adapter.json").is_file()
    assert re.search(r"on 5 lines that .* before, .* after \(whole model ", outcome.stdout)
    # What chat keeps of a model without an adapter, and passes over the data that are few.
    assert re.search(r"45 examples, 5 held out; .* \(3\.0 passes\).*; K = 128;", outcome.stderr)


def test_steps_are_cut_where_memory_is_short(
    write_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = write_tiny_checkpoint(tmp_path / "wide", intermediate_size=4096)
    lines = write_lines(tmp_path / "lines.jsonl")
    command = ("train", "--data", lines, "--model", model, "--batch-tokens", "8192")
    told = capped(*command, "--memory", "0.9GB", home=tmp_path, limit_bytes=8 * 10**9)
    assert told.returncode == 0, told.stderr
    assert re.search(r"8192 a step, \d+ parts a step", told.stderr)
    refused = capped(
        *command, "--memory", "0.3GB", "-o", tmp_path / "more", home=tmp_path, limit_bytes=8 * 10**9
    )
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert re.match(r"ifp: training needs .* even one example at a time .* 0\.30 GB", line)
    assert not (tmp_path / "more").exists()


def test_training_goes_on_from_the_adapter_that_chat_uses(
    ifp: Run, small_model: Path, data: Path, config: Path, tmp_path: Path
) -> None:
    common = ("train", "--model", small_model, "--data", data, "--json")
    first = ifp(*common, "--config", config, "-o", tmp_path / "first")
    assert first.code == 0, first.stderr
    adapter = Path(json.loads(first.stdout)["adapter"])
    shutil.copytree(adapter, small_model / "ifp" / "adapter")
    found = ifp(*common, "--tokens", "600", "-o", tmp_path / "found")
    assert found.code == 0, found.stderr
    assert "K = 64;" in found.stderr  # the adapter's
    named = ifp(*common, "--tokens", "600", "--from", adapter, "-o", tmp_path / "named")
    base = ifp(*common, "--tokens", "600", "--from", "base", "-o", tmp_path / "base")
    assert "K = 128;" in base.stderr
    before = {
        name: json.loads(outcome.stdout)["held_out"]["before"]
        for name, outcome in {"first": first, "found": found, "named": named, "base": base}.items()
    }
    after = json.loads(first.stdout)["held_out"]["after"]
    assert before["found"] == before["named"] == pytest.approx(after, abs=1e-4)
    assert before["base"] != before["found"]
    made = load_adapter(Path(json.loads(found.stdout)["adapter"]))
    assert made.keep_units == (64,)
    started = load_adapter(adapter)
    assert made.base_model == started.base_model
    assert set(started.manifest["changed"]) <= set(made.manifest["changed"])
    again = ifp("train", "--resume", "-o", tmp_path / "found", "--json")
    assert again.code == 0, again.stderr


def test_an_adapter_that_made_things_worse_is_called_so(
    ifp: Run, small_model: Path, tmp_path: Path
) -> None:
    """The lines that are held out are unlike all others."""
    answers = {7: "4 1 9 0 3 8", 15: "7 0 2 6 5 1"}
    rows = [{"prompt": f"say {n}", "response": answers.get(n, "zzzzzzzzzzzz")} for n in range(24)]
    data = tmp_path / "odd.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    outcome = ifp(
        "train", "--model", small_model, "--data", data, "--learning-rate", "0.1",
        "--tokens", "8000", "-o", tmp_path / "run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    figures = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert figures["after"] > figures["before"]
    assert "The adapter made things worse: keep what you had." in outcome.stdout


def test_train_wants_text(ifp: Run, small_model: Path, tmp_path: Path) -> None:
    outcome = ifp("train", "--model", small_model)
    assert outcome.code == 2
    assert "give --data FILE.jsonl" in outcome.stderr
    one = write_lines(tmp_path / "one.jsonl", 1)
    outcome = ifp("train", "--model", small_model, "--data", one, "-o", tmp_path / "run")
    assert outcome.code == 1
    assert "give at least two" in outcome.stderr
    assert not (tmp_path / "run").exists()
