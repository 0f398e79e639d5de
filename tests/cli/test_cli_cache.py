import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.selection.selection import Selection
from ifp_mlx.storage import weights
from ifp_mlx.storage.arrays import load_arrays

Run = Callable[..., Any]


@pytest.fixture
def filled(ifp: Run, small_model: Path) -> Run:
    """Return ``ifp`` with three cached tasks."""
    for task in ("write words", "write a word", "count the number of 12345"):
        assert ifp("cache", "add", task, "--model", small_model, "--keep-units", "64").code == 0
    return ifp


def test_cache_list_tells_task_amount_selector_and_model(filled: Run) -> None:
    outcome = filled("cache", "list")
    assert outcome.code == 0
    for part in ("write a word", "64/192", "prompt", "small", "just now"):
        assert part in outcome.stdout
    assert "3 sub-networks" in outcome.stderr
    records = json.loads(filled("cache", "list", "--json").stdout)
    assert {record["task"] for record in records} >= {"write words", "write a word"}
    assert all(Path(record["path"]).is_file() for record in records)


def test_cache_tells_what_a_task_takes_on_disk_and_in_memory(filled: Run) -> None:
    outcome = filled("cache", "list")
    assert "on disk" in outcome.stdout
    assert "in memory" in outcome.stdout
    assert "at 2.00 GB of weights the least recently used go" in outcome.stderr
    record = json.loads(filled("cache", "show", "write words", "--json").stdout)
    path = Path(record["path"])
    (weights_file,) = {
        file
        for file in (path.parent / "weights").glob("*/*.safetensors")
        if file.stem == Selection.load(path)[0].digest
    }
    assert record["disk_bytes"] == path.stat().st_size + weights_file.stat().st_size
    arrays = load_arrays(weights_file)[0] | load_arrays(weights_file.with_stem("shared"))[0]
    assert record["memory_bytes"] == sum(array.nbytes for array in arrays.values())


def test_cache_list_of_an_empty_cache_says_how_to_fill_it(ifp: Run) -> None:
    outcome = ifp("cache", "list")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "ifp cache add" in outcome.stderr
    assert json.loads(ifp("cache", "list", "--json").stdout) == []


def test_cache_show_compares_with_the_other_entries(filled: Run) -> None:
    outcome = filled("cache", "show", "write words")
    for part in ("write words", "64 of 192", "prompt", "overlap", "write a word"):
        assert part in outcome.stdout
    record = json.loads(filled("cache", "show", "write words", "--json").stdout)
    assert record["num_kept_units"] == 64
    assert {other["task"] for other in record["overlaps"]} == {
        "write a word",
        "count the number of 12345",
    }
    assert all(0 < other["overlap"] <= 1 for other in record["overlaps"])


def test_cache_show_takes_the_beginning_of_a_key(filled: Run) -> None:
    key = json.loads(filled("cache", "list", "--json").stdout)[0]["key"]
    assert json.loads(filled("cache", "show", key[:8], "--json").stdout)["key"] == key


def test_cache_show_tells_the_error_of_quantizing_again(
    ifp: Run, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "automatic_dtype", lambda model: None)  # as on a GPU
    packed = tmp_path / "packed"
    ifp("quantize", small_model, "-o", packed, "--bits", "4", "--group-size", "32")
    added = ifp("cache", "add", "write words", "--model", packed, "--keep-units", "64")
    record = json.loads(ifp("cache", "show", "write words", "--json").stdout)
    squares = np.zeros(2)
    indices = np.array(load_arrays(Path(record["path"]))[0]["ffn"])
    arrays = load_arrays(packed / "model.safetensors")[0]
    for layer, units in enumerate(indices):
        name = f"model.layers.{layer}.mlp.down_proj"
        weight, scales, biases = (arrays[f"{name}.{p}"] for p in ("weight", "scales", "biases"))
        dense = mx.dequantize(weight, scales, biases, group_size=32, bits=4)
        columns = np.array(dense)[:, units]
        weight, scales, biases = mx.quantize(mx.array(columns), 32, 8)
        again = mx.dequantize(weight, scales, biases, group_size=32, bits=8)
        squares += ((np.array(again) - columns) ** 2).sum(), (columns**2).sum()
    error = np.sqrt(squares[0] / squares[1])
    assert 0 < record["requantization_error"] == pytest.approx(error, rel=1e-4)
    told = f"{error:.2%}"
    assert told in added.stderr
    assert told in ifp("cache", "show", "write words").stdout
    # Exactly, from the same entry.
    ifp("generate", "Go", "--task", "write words", "--model", packed, "--keep-units", "64",
        "--max-tokens", "1", "--exact-down")  # fmt: skip
    assert (
        json.loads(ifp("cache", "show", "write words", "--json").stdout)["requantization_error"]
        == 0
    )


def test_cache_add_prints_the_entry(ifp: Run, small_model: Path) -> None:
    outcome = ifp("cache", "add", "write words", "--model", small_model, "--keep", "0.5", "--json")
    record = json.loads(outcome.stdout)
    assert record["task"] == "write words"
    again = ifp("cache", "add", "write words", "--model", small_model, "--keep", "0.5")
    assert "cache hit" in again.stderr


def test_a_reused_sub_network_is_remembered_for_its_own_task(ifp: Run, small_model: Path) -> None:
    def generate(task: str) -> str:
        arguments = ("--model", small_model, "--keep-units", "64", "-m", "1", "--reuse", "0.01")
        return str(ifp("generate", "Go", "--task", task, *arguments).stderr)

    assert 'selected 64 of 192 FFN units for "write words"' in generate("write words")
    line = 'reused "write words" for "write a word" (overlap 0.'
    assert line in generate("write a word")
    assert line in generate("write a word")
    added = ifp("cache", "add", "write a word", "--model", small_model, "--keep-units", "64",
                "--json")  # fmt: skip
    record = json.loads(added.stdout)
    assert (record["task"], record["reused_task"]) == ("write a word", "write words")
    assert 0 < record["reuse_overlap"] < 1
    assert '"write words" (overlap 0.' in ifp("cache", "show", "write a word").stdout
    alone = json.loads(ifp("cache", "show", "write words", "--json").stdout)
    assert (alone["reused_task"], alone["reuse_overlap"]) == (None, None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("inputs.txt", "count the number of 12345\n\nwrite 67890\n"),
        (
            "inputs.jsonl",
            '{"prompt": "count the\u2028number of 12345", "response": "x"}\n'
            '{"prompt": "write 67890"}\n',
        ),
    ],
)
def test_cache_add_with_examples_selects_anew_from_them_too(
    ifp: Run, small_model: Path, tmp_path: Path, name: str, text: str
) -> None:
    def add(*extra: object) -> Any:
        return ifp(
            "cache", "add", "write words", "--model", small_model, "--keep-units", "64", *extra
        )

    def indices() -> Any:
        record = json.loads(ifp("cache", "show", "write words", "--json").stdout)
        return np.array(load_arrays(Path(record["path"]))[0]["ffn"]), record["num_examples"]

    def weights() -> list[Path]:
        return sorted(Path(ifp("cache", "path").stdout.strip()).glob("weights/*/*.safetensors"))

    add()
    plain, none = indices()
    stored = weights()
    path = tmp_path / name
    path.write_text(text)
    assert "selected" in add("--examples", path).stderr  # not a cache hit
    informed, two = indices()
    assert (none, two) == (0, 2)
    assert not np.array_equal(plain, informed)
    assert len(weights()) == len(stored) > 1
    assert weights() != stored
    assert "the description and 2 examples" in ifp("cache", "show", "write words").stdout
    # A chat about the task takes it from there.
    assert "cache hit" in add().stderr
    assert np.array_equal(indices()[0], informed)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("inputs.txt", " \n", "holds no example"),
        ("inputs.jsonl", '{"text": "x"}\n', ':1: no "prompt" and no "messages" with one'),
        ("inputs.jsonl", '{"prompt": "x"}\n[1]\n', ":2: no JSON object"),
        ("inputs.txt", "caf\xe9\n", "not UTF-8"),
        ("missing.txt", None, "cannot read the examples"),
    ],
)
def test_cache_add_refuses_examples_that_are_none(
    ifp: Run, small_model: Path, tmp_path: Path, name: str, text: str | None, complaint: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    outcome = ifp("cache", "add", "write words", "--model", small_model, "--examples", path)
    assert outcome.code == 1
    assert complaint in outcome.stderr
    assert json.loads(ifp("cache", "list", "--json").stdout) == []


def test_cache_add_refuses_examples_that_nothing_reads(
    ifp: Run, small_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "inputs.txt"
    path.write_text("write words\n")
    outcome = ifp(
        "cache", "add", "x", "--model", small_model, "--selector", "random", "--examples", path
    )
    assert outcome.code == 2
    assert "random selects without reading" in outcome.stderr
    assert json.loads(ifp("cache", "list", "--json").stdout) == []


def test_cache_rm_removes_what_is_named(filled: Run) -> None:
    outcome = filled("cache", "rm", "write words", "write a word")
    assert outcome.code == 0
    assert 'removed "write words"' in outcome.stderr
    assert len(json.loads(filled("cache", "list", "--json").stdout)) == 1


def test_cache_rm_removes_nothing_if_one_name_is_wrong(filled: Run) -> None:
    outcome = filled("cache", "rm", "write words", "no such task")
    assert outcome.code == 1
    assert "no cached sub-network for 'no such task'" in outcome.stderr
    assert len(json.loads(filled("cache", "list", "--json").stdout)) == 3


def test_cache_prune_removes_what_does_not_fit(filled: Run) -> None:
    assert json.loads(filled("cache", "prune", "--max-mb", "1", "--json").stdout) == []
    weights = Path(filled("cache", "path").stdout.strip()) / "weights"
    assert list(weights.glob("*/*"))
    outcome = filled("cache", "prune", "--max-mb", "0")
    assert "removed 3 sub-networks" in outcome.stderr
    assert not list(weights.glob("*/*"))
    assert json.loads(filled("cache", "list", "--json").stdout) == []


def test_cache_verify_reports_damage_and_moves_it_aside(filled: Run) -> None:
    assert filled("cache", "verify").code == 0
    damaged = Path(json.loads(filled("cache", "list", "--json").stdout)[0]["path"])
    damaged.write_bytes(damaged.read_bytes()[:-40])
    outcome = filled("cache", "verify", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.stdout)["good"] == 2
    assert len(json.loads(outcome.stdout)["problems"]) == 1
    assert filled("cache", "verify").code == 0


def test_cache_path_is_in_the_home_folder(ifp: Run, tmp_path: Path) -> None:
    folder = str(tmp_path / "home" / "subnets")
    assert ifp("cache", "path").stdout == f"{folder}\n"
    assert json.loads(ifp("cache", "path", "--json").stdout) == {"path": folder}
