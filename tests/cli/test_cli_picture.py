"""``ifp cache show --picture``: the units of a cached sub-network, drawn."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def filled(ifp: Run, small_model: Path) -> Run:
    """Return ``ifp`` with two cached tasks."""
    for task in ("write words", "count <b>numbers</b>"):
        assert ifp("cache", "add", task, "--model", small_model, "--keep-units", "64").code == 0
    return ifp


def texts(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_picture_is_drawn_beside_what_is_shown(filled: Run, tmp_path: Path) -> None:
    path = tmp_path / "one.svg"
    outcome = filled("cache", "show", "write words", "--picture", path)
    assert outcome.code == 0
    assert f"drew {path}" in outcome.stderr
    assert "64 of 192" in outcome.stdout
    assert texts(path)[:2] == ["write words", "64 of 192 FFN units a layer"]
    assert any("higher score" in text for text in texts(path))  # scores are kept in the cache


def test_a_picture_can_compare(filled: Run, tmp_path: Path) -> None:
    path = tmp_path / "two.SVG"
    other = "count <b>numbers</b>"
    arguments = ("cache", "show", "write words", "--picture", path, "--against", other, "--json")
    record = json.loads(filled(*arguments).stdout)
    share = f"{record['overlaps'][0]['overlap']:.0%}"
    assert texts(path)[1] == f"64 of 192 FFN units a layer, {share} shared with {other}"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--picture", "x.png"), "ends in .svg"),
        (("--picture", "."), "ends in .svg"),
        (("--against", "write words"), "add --picture"),
        (("--picture", "x.svg", "--against", "no such task"), "no cached sub-network"),
        (("--picture", "/dev/null/x.svg"), "/dev/null"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    filled: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = filled("cache", "show", "write words", *arguments)
    assert outcome.code in (1, 2)
    assert complaint in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.svg"))


def test_tasks_of_different_models_are_not_compared(
    filled: Run, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_checkpoint(name="other", num_hidden_layers=2)
    added = ("cache", "add", "sing", "--model", other, "--keep-units", "64")
    assert filled(*added, "--selector", "random").code == 0
    path = tmp_path / "x.svg"
    outcome = filled("cache", "show", "write words", "--picture", path, "--against", "sing")
    assert outcome.code == 2
    assert "different models" in outcome.stderr
    assert not path.exists()
