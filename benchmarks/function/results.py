"""The files of a run: one line of results a unit, and its answers and figures token by token."""

import concurrent.futures
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fidelity
import numpy as np
from rows import Unit

Answers = list[list[list[int]]]
"""Token ids of the answer to each turn of each item, the end-of-message id included."""


@dataclasses.dataclass
class Pending:
    """A measured unit whose answers are still being judged.

    Attributes:
        unit: what was measured.
        line: the result, all but the outcomes.
        outcomes: name of the item, and of its turn if there are several -> verdict to come.
    """

    unit: Unit
    line: dict[str, Any]
    outcomes: dict[str, "concurrent.futures.Future[float]"]


class Results:
    """The files of a run.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("answers", "tokens"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._rows = folder / "rows.jsonl"
        self._pending: list[Pending] = []
        lines = self._rows.read_text("utf-8").splitlines() if self._rows.exists() else []
        self.keys = {json.loads(line)["key"] for line in lines if line.endswith("}")}

    def count(self, units: Sequence[Unit]) -> int:
        """Return how many units are done."""
        return sum(unit.key in self.keys for unit in units)

    def add(self, pending: Pending) -> None:
        """Take a unit whose answers are being judged."""
        self._pending.append(pending)
        self.keys.add(pending.unit.key)

    def write_finished(self, *, wait: bool = False) -> None:
        """Append the units whose answers are judged."""
        waiting = []
        for pending in self._pending:
            if not wait and not all(future.done() for future in pending.outcomes.values()):
                waiting.append(pending)
                continue
            outcomes = {name: round(f.result(), 4) for name, f in pending.outcomes.items()}
            score = float(np.mean(list(outcomes.values()))) if outcomes else None
            line = {"key": pending.unit.key, "score": score, **pending.line, "outcomes": outcomes}
            with self._rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"           {pending.unit.key}: score {score}", flush=True)
        self._pending = waiting

    def save_answers(self, unit: Unit, answers: Answers) -> None:
        """Write the token ids of a unit's answers."""
        flat = [turn for item in answers for turn in item]
        np.savez_compressed(
            self._file("answers", unit),
            turns=np.array([len(item) for item in answers], np.int32),
            lengths=np.array([len(turn) for turn in flat], np.int32),
            ids=np.array([token for turn in flat for token in turn], np.int32),
        )

    def load_answers(self, unit: Unit) -> Answers:
        """Read what ``save_answers`` wrote."""
        with np.load(self._file("answers", unit)) as file:
            flat = iter(np.split(file["ids"], np.cumsum(file["lengths"])[:-1]))
            return [[next(flat).tolist() for _ in range(count)] for count in file["turns"]]

    def save_tokens(self, unit: Unit, kind: str, tokens: fidelity.TokenFigures) -> None:
        """Write the figures of every token of a unit."""
        tokens.save(self._file("tokens", unit, f"|{kind}"))

    def _file(self, folder: str, unit: Unit, ending: str = "") -> Path:
        name = (unit.key + ending).replace("/", "_").replace("|", "--")
        return self.folder / folder / f"{name}.npz"
