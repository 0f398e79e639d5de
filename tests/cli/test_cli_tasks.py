import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifp_mlx.storage.arrays import load_arrays

Run = Callable[..., Any]
TASKS = ("write words", "write a word", "count the number of 12345")


@pytest.fixture
def filled(ifp: Run, small_model: Path) -> Run:
    """Return ``ifp`` with three cached tasks of one size and one of another."""
    for task in TASKS:
        assert ifp("cache", "add", task, "--model", small_model, "--keep-units", "64").code == 0
    assert ifp("cache", "add", "other", "--model", small_model, "--keep-units", "128").code == 0
    return ifp


def test_tasks_groups_what_can_be_compared(filled: Run) -> None:
    groups = json.loads(filled("cache", "list", "--tree", "--json").stdout)
    assert sorted((group["num_kept_units"], len(group["tasks"])) for group in groups) == [
        (64, 3),
        (128, 1),
    ]
    (group,) = [group for group in groups if group["num_kept_units"] == 64]
    assert group["tasks"] == sorted(TASKS)
    assert all(group["overlaps"][i][i] == 1 for i in range(3))


def test_tasks_threshold_sets_the_size_of_families(filled: Run) -> None:
    def num_families(threshold: str) -> int:
        groups = json.loads(
            filled("cache", "list", "--tree", "--threshold", threshold, "--json").stdout
        )
        return sum(len(group["families"]) for group in groups)

    assert num_families("0") == 2
    assert num_families("1") == 4


def test_tasks_shows_a_tree(filled: Run) -> None:
    text = filled("cache", "list", "--tree", "--threshold", "0").stdout
    assert "small, prompt, 64 of 192 units" in text
    assert "family 1, overlap 0." in text
    for task in TASKS:
        assert task in text


def test_tasks_leaves_out_a_damaged_entry(filled: Run) -> None:
    damaged = Path(json.loads(filled("cache", "show", "write words", "--json").stdout)["path"])
    arrays, header = load_arrays(damaged)
    mx.eval(arrays)
    beyond = {name: indices.astype(mx.int32) + 1000 for name, indices in arrays.items()}
    mx.save_safetensors(str(damaged), beyond, header)
    outcome = filled("cache", "list", "--tree")
    assert outcome.code == 0
    assert f"left out {damaged.name}: " in outcome.stderr
    assert "write a word" in outcome.stdout
    assert "write words" not in outcome.stdout


def test_tasks_draws_a_picture(filled: Run, tmp_path: Path) -> None:
    picture = tmp_path / "tasks.png"
    assert filled("cache", "list", "--tree", "--png", picture).code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tasks_of_an_empty_cache_says_how_to_add_one(ifp: Run, tmp_path: Path) -> None:
    outcome = ifp("cache", "list", "--tree")
    assert outcome.code == 0
    assert "ifp cache add" in outcome.stderr
    assert json.loads(ifp("cache", "list", "--tree", "--json").stdout) == []


@pytest.mark.parametrize(
    ("name", "part"), [("x.svg", "--png writes a .png file"), ("x.png", "no cached tasks to draw")]
)
def test_tasks_refuses_a_picture_it_cannot_draw(
    ifp: Run, tmp_path: Path, name: str, part: str
) -> None:
    outcome = ifp("cache", "list", "--tree", "--png", tmp_path / name)
    assert outcome.code == 2
    assert part in outcome.stderr
    assert not (tmp_path / name).exists()


def test_a_picture_is_of_the_tree(ifp: Run, tmp_path: Path) -> None:
    outcome = ifp("cache", "list", "--png", tmp_path / "x.png")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "add --tree" in outcome.stderr
