"""Jobs: which rows are measured on which sets, and in which order.

A job is a JSON file::

    {"model": "qwen-coder",
     "rows": {"whole": {},
              "part-whole/task/50": {"read": "part", "part": {"units": "task", "kept": 0.5}}},
     "steps": [{"rows": ["whole", "part-whole/task/50"], "sets": ["mbpp", "math"],
                "own": 128, "reference": 128}]}

Steps are done in order, and in a step every row of a set before the next set, so that what
matters most comes first. ``own`` and ``reference`` are numbers of items whose fidelity figures are
measured on the whole model's own answers and on reference answers; ``limit`` cuts a set.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from decoding import Reading
from parts import PartSpec
from sets import SET_NAMES

WHOLE = "whole"
"""The name of the row that all others are compared with."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Row:
    """Who reads and who writes.

    Attributes:
        name: of the row.
        read: who reads prompts.
        write: who writes answers.
        part: what the part keeps.
        reading: which tokens are read by another model than ``read``.
    """

    name: str
    read: Literal["whole", "part"] = "whole"
    write: Literal["whole", "part"] = "whole"
    part: PartSpec = dataclasses.field(default_factory=PartSpec)
    reading: Reading = dataclasses.field(default_factory=Reading)

    def __post_init__(self) -> None:
        if self.part.units == "block" and (self.write == "part" or not self.reading.block):
            raise ValueError(f"{self.name}: a part by block only reads, and needs reading.block")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One row on one set: what is measured, written and resumed as a whole."""

    model: str
    row: Row
    set_name: str
    own: int
    reference: int
    limit: int | None

    @property
    def key(self) -> str:
        """Identifies the unit in files of results."""
        return f"{self.model}|{self.row.name}|{self.set_name}"


def load_job(path: Path) -> list[Unit]:
    """Return the units of a job file, in the order in which they are to be done.

    Raises:
        ValueError: an unknown key, row or set, or a step that lacks the whole model's row.
    """
    job = json.loads(path.read_text("utf-8"))
    _check_keys(job, {"model", "rows", "steps", "note"}, str(path))
    rows = {name: _row(name, settings) for name, settings in job["rows"].items()}
    units: list[Unit] = []
    done: set[str] = set()
    for step in job["steps"]:
        _check_keys(step, {"rows", "sets", "own", "reference", "limit"}, f"{path}: a step")
        for set_name in step["sets"]:
            if set_name not in SET_NAMES:
                raise ValueError(f"{path}: no set {set_name!r}; there are: {', '.join(SET_NAMES)}")
            for name in step["rows"]:
                unit = Unit(
                    model=job["model"],
                    row=rows[name],
                    set_name=set_name,
                    own=step.get("own", 0),
                    reference=step.get("reference", 0),
                    limit=step.get("limit"),
                )
                if name != WHOLE and f"{unit.model}|{WHOLE}|{set_name}" not in done:
                    raise ValueError(f"{path}: {unit.key} comes before the row {WHOLE!r}")
                if unit.key not in done:
                    units.append(unit)
                    done.add(unit.key)
    return units


def _row(name: str, settings: dict[str, Any]) -> Row:
    part = _from_dict(PartSpec, settings.get("part", {}), name)
    reading = _from_dict(Reading, settings.get("reading", {}), name)
    rest = {key: value for key, value in settings.items() if key not in ("part", "reading")}
    return _from_dict(Row, {"name": name, "part": part, "reading": reading, **rest}, name)


def _from_dict(kind: type[T], settings: dict[str, Any], where: str) -> T:
    _check_keys(settings, {field.name for field in dataclasses.fields(kind)}, where)  # type: ignore[arg-type]
    return kind(**settings)


def _check_keys(settings: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := set(settings) - known:
        raise ValueError(f"{where}: unknown {sorted(unknown)}; known are {sorted(known)}")
