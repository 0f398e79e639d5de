"""What was measured, kept on disk so that a run that was stopped goes on, and what it says."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ifp_mlx.fitting.candidates import Candidate
from ifp_mlx.fitting.fidelity import Fidelity
from ifp_mlx.storage.files import write_bytes_atomically

_FORMAT_VERSION = 2
MOST_CHANGED = 1.2
"""A candidate that changes more than this many of 100 tokens does not answer as the whole model
does: up to here function stayed within the error of measuring it, from 1.3 on it fell by three to
seven points (docs/fidelity.md)."""

LOST_CHANGED = 10.0
"""Past this less than a sixth of what was right is left: what is still smaller is not measured."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One candidate's figures.

    Attributes:
        candidate: which.
        disk_bytes: of its weights, stored.
        memory_bytes: predicted peak in use, with a conversation.
        fidelity: against the whole model.
        tokens_per_s: decoding here; None if it was not tried.
        first_token_s: to the first token of the examples' prompts; None if it was not tried.
        num_right: answers that the user's check found right; None without a check.
        num_checked: how many it saw.
        is_lost: it was given up early.
        is_adapted: an adapter's part, trained to answer in its own way: that it differs from the
            whole model says nothing, only a check does.
    """

    candidate: Candidate
    disk_bytes: int
    memory_bytes: int
    fidelity: Fidelity
    tokens_per_s: float | None = None
    first_token_s: float | None = None
    num_right: int | None = None
    num_checked: int = 0
    is_lost: bool = False
    is_adapted: bool = False

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Measured":
        """Return what ``dataclasses.asdict`` made a record of."""
        candidate, fidelity = Candidate(**record["candidate"]), Fidelity(**record["fidelity"])
        return cls(**{**record, "candidate": candidate, "fidelity": fidelity})


class FitRecord:
    """The results of one fit in one file.

    Args:
        folder: of all fits.
        facts: everything that the figures depend on; a run with others is another record.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        text = json.dumps({"version": _FORMAT_VERSION, **facts}, sort_keys=True)
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self._facts = facts
        self._measured = self._read()

    def __iter__(self) -> Any:
        return iter(self._measured.values())

    def get(self, candidate: Candidate) -> Measured | None:
        """Return what is known of a candidate."""
        return self._measured.get(candidate.key)

    def add(self, measured: Measured) -> None:
        """Keep what was measured; it is on disk when this returns.

        Raises:
            ResourceError: the folder cannot be written.
        """
        self._measured[measured.candidate.key] = measured
        rows = [dataclasses.asdict(row) for row in self._measured.values()]
        content = json.dumps({**self._facts, "rows": rows}, indent=1)
        write_bytes_atomically(self.path, content.encode())

    def _read(self) -> dict[str, Measured]:
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))["rows"]
            measured = [Measured.of(row) for row in rows]
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: measured again
            return {}
        return {row.candidate.key: row for row in measured}


def frontier(rows: Sequence[Measured]) -> set[str]:
    """Return the keys of the rows that no other beats in memory without being less faithful."""
    kept, best = set(), float("inf")
    for row in sorted(rows, key=lambda row: (row.memory_bytes, row.fidelity.changed)):
        if row.fidelity.changed < best:
            best = row.fidelity.changed
            kept.add(row.candidate.key)
    return kept


def is_as_good(row: Measured, whole: Measured) -> bool:
    """Return whether a candidate keeps up with the whole model.

    The user's check decides, with one answer's leave; so do the tokens that change, which see what
    a small check does not. An adapter's part has its check alone.
    """
    if row.is_lost or (row.fidelity.changed > MOST_CHANGED and not row.is_adapted):
        return False
    if row.num_right is None or whole.num_right is None:
        return not row.is_adapted
    return row.num_right >= whole.num_right - 1


def recommend(rows: Sequence[Measured], memory_bytes: int | None = None) -> Measured | None:
    """Return the candidate to use, None if none that keeps up fits.

    Args:
        rows: with the whole model's among them.
        memory_bytes: the most that may be used; None recommends the smallest that keeps up.
    """
    whole = max(rows, key=lambda row: (row.candidate.num_kept_units, row.candidate.bits is None))
    good = [row for row in rows if is_as_good(row, whole)]
    if memory_bytes is None:
        return min(good, key=lambda row: (row.memory_bytes, row.disk_bytes), default=None)
    fitting = [row for row in good if row.memory_bytes <= memory_bytes]
    return min(fitting, key=lambda row: row.fidelity.changed, default=None)
