"""Training text from the hub: the stream is the library's, the checks and errors are ours."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ifp_mlx.errors import DataError, UsageError
from ifp_mlx.text.examples import domain_of
from ifp_mlx.text.records import BadLines, check_prompt_response, read_records

_GOOD = {"prompt": "two and two", "response": "four"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for the datasets library; returns what it was asked for, rows put in first."""
    asked: list[Any] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        asked.append((name, split, streaming))
        if name == "nobody/nothing":
            raise FileNotFoundError("no such data set\nand a long explanation")
        yield from [_GOOD, {"prompt": "", "response": "x"}, {**_GOOD, "response": "4"}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def _read(source: str, *, skip: bool = False) -> tuple[list[dict[str, Any]], BadLines]:
    bad = BadLines(skip=skip)
    return list(read_records(Path(source), check_prompt_response, bad)), bad


def test_hub_rows_are_streamed_and_checked(hub: list[Any]) -> None:
    records, bad = _read("hub:someone/sums:validation", skip=True)
    assert records == [_GOOD, {**_GOOD, "response": "4"}]
    assert bad.counts == {"field 'prompt' is missing or empty": 1}
    assert hub == [("someone/sums", "validation", True)]


def test_bad_hub_row_stops_with_its_number(hub: list[Any]) -> None:
    with pytest.raises(DataError, match=r"hub:someone/sums:2: field 'prompt' is missing"):
        _read("hub:someone/sums")
    assert hub == [("someone/sums", "train", True)]


def test_missing_data_set_is_one_line(hub: list[Any]) -> None:
    with pytest.raises(
        DataError, match=r"hub:nobody/nothing:train cannot be read: no such data set$"
    ):
        _read("hub:nobody/nothing")
    assert hub


def test_data_set_without_owner_is_refused() -> None:
    with pytest.raises(UsageError, match="write hub:OWNER/NAME"):
        _read("hub:sums")


def test_hub_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'ifp-mlx\[datasets\]'"):
        _read("hub:someone/sums")


def test_hub_domain_is_the_name_without_owner() -> None:
    assert domain_of(Path("hub:someone/sums:train")) == "sums"
    assert domain_of(Path("data/sums.jsonl.xz")) == "sums"
