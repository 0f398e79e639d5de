import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def pulled(ifp: Run, small_model: Path, tmp_path: Path) -> Path:
    """Return the models folder with two models, one of them with two cached tasks."""
    folder = tmp_path / "home" / "models"
    folder.mkdir(parents=True)
    shutil.copytree(small_model, folder / "small")
    shutil.copytree(small_model, folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"nothing")
    for task in ("write words", "count"):
        assert ifp("cache", "add", task, "--model", "small", "--keep-units", "64").code == 0
    return folder


def test_models_list_tells_size_weights_fit_and_tasks(ifp: Run, pulled: Path) -> None:
    outcome = ifp("models", "list")
    assert outcome.code == 0
    (row,) = [line for line in outcome.stdout.splitlines() if line.startswith("small")]
    for part in ("float32", " 2 ", "192 FFN units", "fits"):
        assert part in row
    (broken,) = [line for line in outcome.stdout.splitlines() if line.startswith("broken")]
    assert "model.safetensors" in broken

    found = {
        record["name"]: record for record in json.loads(ifp("models", "list", "--json").stdout)
    }
    small = found["small"]
    assert {task["task"] for task in small["tasks"]} == {"write words", "count"}
    assert {task["num_kept_units"] for task in small["tasks"]} == {64}
    assert small["disk_bytes"] == sum(
        file.stat().st_size for file in (pulled / "small").rglob("*") if file.is_file()
    )
    assert small["fits"]["whole"]["fits"]
    assert small["fits"]["whole"]["num_kept_units"] == 192
    assert found["broken"]["problem"]
    assert found["broken"]["fits"] is None


def test_models_show_tells_of_each_amount_and_task(ifp: Run, pulled: Path) -> None:
    text = ifp("models", "show", "small").stdout
    for part in ("llama, float32", "192 of 192 FFN units", "write words (64 units)", "count (64"):
        assert part in text
    assert "in all with 4,096 tokens of context, fits" in text
    assert ifp("models", "show", pulled / "small").stdout == text
    outcome = ifp("models", "show", "nothing")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert "there is no model 'nothing'" in outcome.stderr


def test_models_rm_takes_the_tasks_along_and_nothing_else(ifp: Run, pulled: Path) -> None:
    outcome = ifp("models", "rm", "small")
    assert outcome.code == 0
    assert "removed small and 2 sub-networks" in outcome.stderr
    assert [path.name for path in pulled.iterdir()] == ["broken"]
    assert json.loads(ifp("cache", "list", "--json").stdout) == []


def test_models_rm_removes_all_or_none(ifp: Run, pulled: Path, small_model: Path) -> None:
    for name in ("nothing", small_model, "../models/small", "."):
        outcome = ifp("models", "rm", "small", name)
        assert (outcome.code, outcome.stdout) == (2, "")
        assert "ifp models list shows them" in outcome.stderr
    assert (pulled / "small" / "config.json").is_file()
    assert small_model.is_dir()


def test_no_models_say_how_to_get_one(ifp: Run) -> None:
    outcome = ifp("models", "list")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "ifp pull smollm2-135m" in outcome.stderr
    assert json.loads(ifp("models", "list", "--json").stdout) == []
