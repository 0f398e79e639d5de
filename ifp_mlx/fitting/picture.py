"""The picture of a fit: what each size takes, and what it costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ifp_mlx.errors import UsageError
from ifp_mlx.fitting.results import Measured, frontier
from ifp_mlx.units.amounts import Amounts


def draw(rows: Sequence[Measured], amounts: Amounts, title: str, path: Path) -> None:
    """Write a PNG: memory against changed tokens, the frontier joined by a line.

    Args:
        rows: what was measured.
        amounts: of units.
        title: the task.
        path: the file.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError("pictures need matplotlib: pip install 'ifp-mlx[plots]'") from None
    best = frontier(rows)
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    line = sorted(
        (row.memory_bytes / 1e9, row.fidelity.changed) for row in rows if row.candidate.key in best
    )
    axes.plot(*zip(*line, strict=True), color="0.6", linewidth=1, zorder=1)
    for name, colour, chosen in _groups(rows, amounts):
        axes.scatter(
            [row.memory_bytes / 1e9 for row in chosen],
            [row.fidelity.changed for row in chosen],
            color=colour,
            label=name,
            zorder=2,
        )
        for row in chosen:
            axes.annotate(
                _short(row, amounts),
                (row.memory_bytes / 1e9, row.fidelity.changed),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set_xlabel("memory in use, GB")
    axes.set_ylabel("of 100 tokens, changed")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    finally:
        pyplot.close(figure)


def _groups(rows: Sequence[Measured], amounts: Amounts) -> list[tuple[str, str, list[Measured]]]:
    def is_whole(row: Measured) -> bool:
        return row.candidate.num_kept_units == amounts.num_units

    reading = [row for row in rows if row.candidate.only_reads]
    others = [row for row in rows if not row.candidate.only_reads]
    groups: list[tuple[str, str, list[Any]]] = [
        ("whole model, fewer bits", "tab:blue", [row for row in others if is_whole(row)]),
        (f"fewer {amounts.label}", "tab:orange", [r for r in others if not is_whole(r)]),
        ("read with a part", "tab:green", reading),
    ]
    return [group for group in groups if group[2]]


def _short(row: Measured, amounts: Amounts) -> str:
    share = row.candidate.num_kept_units / amounts.num_units
    name = "" if share == 1 else f"{share:.0%}"
    bits = "" if row.candidate.bits is None else f"{row.candidate.bits} bits"
    return ", ".join(part for part in (name, bits) if part) or "whole"
