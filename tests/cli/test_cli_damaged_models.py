"""Every way that a checkpoint can be wrong gives one line, and leaves nothing behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

Run = Callable[..., Any]


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config))


def of_another_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))


def with_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "model.py"}))


def not_a_number(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name] * float("nan")
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, {"format": "mlx"})


def pickled(folder: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}.")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (without_weights, "safetensors"),
        (without_config, "config.json"),
        (truncated, "model.safetensors"),
        (without_width, "intermediate_size"),
        (of_another_family, "'mamba' is not supported; these are:"),
        (with_code, "model_file"),
        (not_a_number, "not numbers (NaN or infinity)"),
        (pickled, "pickle"),
    ],
)
def test_damaged_model_is_reported_in_one_line(
    ifp: Run, small_model: Path, tmp_path: Path, damage: Callable[[Path], None], part: str
) -> None:
    damage(small_model)
    outcome = ifp("generate", "hello", "--model", small_model, "--task", "write words")
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("ifp: ")]
    assert outcome.code == 1
    assert outcome.stdout == ""
    assert len(lines) == 1
    assert part in lines[0]
    assert "Traceback" not in outcome.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_file_in_place_of_a_model_is_reported(ifp: Run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    outcome = ifp("generate", "hello", "--model", tmp_path / "model.gguf")
    assert outcome.code == 1
    assert len(outcome.stderr.splitlines()) == 1
