"""Descriptions of everyday tasks never share a sub-network unless the user asks for it."""

import dataclasses
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ifp_mlx.assistant import Assistant
from ifp_mlx.cli.loading import describe_subnetwork
from ifp_mlx.cli.options import AssistantOptions
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.subnets.model_files import ModelFiles
from ifp_mlx.subnets.task_cache import TaskCache

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CheckpointFactory = Callable[..., Path]
K = 64


@pytest.fixture(scope="module")
def merges() -> ModuleType:
    spec = importlib.util.spec_from_file_location("task_merges", BENCHMARKS / "task_merges.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((BENCHMARKS / "results/task-merges.json").read_text())
    return result


def descriptions() -> list[str]:
    tasks = json.loads((BENCHMARKS / "everyday_tasks.json").read_text(encoding="utf-8"))
    return [wording for task in tasks for wording in task]


@pytest.fixture
def alike(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Assistant]:
    """An assistant on whose model all descriptions select the very same units."""
    path = tiny_checkpoint()
    assistant = Assistant.load(path)
    selection = dataclasses.replace(
        select_random(assistant.skeleton, K), selector=assistant.files.selector
    )
    monkeypatch.setattr(Assistant, "_select", lambda *_: (selection, 0.0))
    monkeypatch.setattr(ModelFiles, "is_adapted", property(lambda self: True))

    def load(folder: str, **options: Any) -> Assistant:
        return Assistant.load(path, cache=TaskCache(tmp_path / folder), **options)

    return load


@pytest.mark.parametrize("order", [None, 1])
def test_nothing_is_merged_without_being_asked_for(
    alike: Callable[..., Assistant], order: int | None
) -> None:
    tasks = descriptions()
    assert len(tasks) >= 80
    if order is not None:
        random.Random(order).shuffle(tasks)
    assistant = alike("cache")
    for number, task in enumerate(tasks):
        subnet = assistant.subnetwork_for_task(task, K)
        assert subnet.reused_task is None
        assert (subnet.close_task is None) == (number == 0)
    assert assistant.cache is not None
    entries = assistant.cache.entries()
    assert len(entries) == len(tasks)
    assert all(entry.reuse is None for entry in entries)


def test_the_offer_says_what_to_type(alike: Callable[..., Assistant]) -> None:
    first = alike("cache")
    first.subnetwork_for_task("make lists", K)
    line = describe_subnetwork(first.subnetwork_for_task("put things into lists", K))
    assert 'close to "make lists": --reuse 1.00 would take its units' in line
    lenient = alike("cache", reuse_threshold=1.0)
    subnet = lenient.subnetwork_for_task("jot down lists", K)
    assert subnet.reused_task in ("make lists", "put things into lists")
    assert describe_subnetwork(subnet).startswith(f'reused "{subnet.reused_task}"')


def test_sharing_is_off_by_default() -> None:
    assert AssistantOptions().reuse == 0.0


def test_merges_are_those_that_are_stored(merges: ModuleType, stored: dict[str, Any]) -> None:
    assert stored["texts"] == descriptions()
    for amount in stored["amounts"]:
        assert len(amount["overlaps"]) == len(stored["texts"])
        assert merges.summarise(amount["overlaps"]) == amount["merges"]


def test_no_threshold_would_share_only_what_is_one_task(stored: dict[str, Any]) -> None:
    """Why sharing is off: wherever it shares a tenth of the tasks, it merges different ones too."""
    for amount in stored["amounts"]:
        for row in amount["merges"]:
            useful = row["right"][0] >= len(stored["texts"]) / 2 / 10
            assert not useful or row["wrong"][0] > 0
