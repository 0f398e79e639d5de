"""Results of a benchmark: one JSON document a run, and the tables that people read."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ifp_mlx.storage.files import write_bytes_atomically

Fact = str | int | float | None


def document(kind: str, facts: Mapping[str, Any], rows: Sequence[Any]) -> dict[str, Any]:
    """Return a run as JSON values.

    Args:
        kind: ``latency``, ``slicing`` or ``switch``.
        facts: machine, shape, dtype, repeats: all that the figures depend on.
        rows: dataclasses.
    """
    return {"benchmark": kind, **facts, "rows": [dataclasses.asdict(row) for row in rows]}


def write_document(path: Path, content: Mapping[str, Any]) -> None:
    """Write a run, whole or not at all.

    Raises:
        ResourceError: the folder cannot be written.
    """
    text = json.dumps(content, indent=1) + "\n"
    write_bytes_atomically(path, text.encode("utf-8"))


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up: the first to the left, others to the right."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(headers), line(rule), *(line(row) for row in rows)])


def latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of latency rows, as ``document`` holds them. Times in ms, memory in GB."""
    headers = (
        "model",
        "prompt",
        "K",
        "selection",
        "loading",
        "prefill",
        "TTFT",
        "spread",
        "decode",
        "tokens/s",
        "memory",
        "TTFT / source",
        "TTFT / compact",
        "decode / source",
        "decode / compact",
        "of copy bandwidth",
    )
    return markdown_table(headers, [_latency_cells(row) for row in rows])


def slicing_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of slicing rows. Times in ms."""
    headers = ("gather", "time", "spread", "GB", "device copy", "time / copy")
    cells = [
        (
            row["name"],
            _ms(row["timing"]),
            _spread(row["timing"]),
            f"{row['num_bytes'] / 1e9:.2f}",
            f"{row['copy_s'] * 1e3:.2f}",
            f"{row['ratio']:.2f}",
        )
        for row in rows
    ]
    return markdown_table(headers, cells)


def switch_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of switching rows. Times in ms, memory in GB."""
    headers = ("tasks", "same task", "resident", "indices on disk", "new task", "added", "a task")
    cells = [
        (
            str(row["num_tasks"]),
            *(_ms(row[name]) for name in ("stay", "resident", "indices", "anew")),
            f"{row['added_bytes'] / 1e9:.2f}",
            f"{row['task_bytes'] / 1e9:.3f}",
        )
        for row in rows
    ]
    return markdown_table(headers, cells)


def _latency_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        str(row["prompt_tokens"]),
        str(row["num_kept_units"] or ""),
        _ms(row["selection"]),
        _ms(row["loading"]),
        _ms(row["prefill"]),
        _ms(row["ttft"]),
        _spread(row["ttft"]),
        _ms(row["decode"], digits=0),
        _number(row["tokens_per_s"], 0),
        _number(row["peak_memory_bytes"], 2, 1e9),
        _number(row["ttft_to_dense"], 3),
        _number(row["ttft_to_small"], 3),
        _number(row["decode_to_dense"], 3),
        _number(row["decode_to_small"], 3),
        _number(row["bandwidth_share"], 2),
    )


def _ms(timing: Mapping[str, float] | None, digits: int = 1) -> str:
    return "" if timing is None else f"{timing['median_s'] * 1e3:.{digits}f}"


def _spread(timing: Mapping[str, float] | None) -> str:
    if timing is None:
        return ""
    return f"{timing['min_s'] * 1e3:.1f}-{timing['max_s'] * 1e3:.1f}"


def _number(value: Fact, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{float(value) / unit:.{digits}f}"
