"""Write the tables of docs/chat.md from stored results; ``--check`` only compares."""

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from page_tables import RESULTS, Table, as_table, read, run

REUSE = (0.8, 0.85, 0.9, 0.92, 0.95)
DRIFT = (0.70, 0.75, 0.80)


def first_message() -> str:
    """Return what deciding whether a prompt selects costs, from first_message.py."""
    rows = [
        (
            f"{found['tokens']:,}",
            str(found["num_pairs"]),
            f"{found['decision_cpu_s'] * 1e3:.1f} ms of {found['dense_s']:.1f} s",
            f"{found['no_task_cpu_ratio']:.3f}",
            f"{found['no_task_ratio']:.3f}",
            f"{found['always_selected_cpu_ratio']:.2f}",
        )
        for found in read(RESULTS / "first-message.json")["classes"]
    ]
    head = (
        "tokens", "pairs", "deciding", "no task / `--dense`: CPU time", "time",
        "always selecting / `--dense`: CPU time, one prompt",
    )  # fmt: skip
    return as_table(head, rows)


def lines() -> str:
    """Return many prompts in one process, in mlx-lm's batches, and a process each."""
    stored = read(RESULTS / "lines.json")
    labels = {
        "`ifp generate --lines`": "lines",
        "mlx-lm's `batch_generate` on the exported sub-network": "mlx_lm",
        f"a loop of {stored['prompts']} processes ({stored['processes']} were timed)": "loop",
    }

    def seconds(value: float | list[float]) -> str:
        return f"{statistics.median(value) if isinstance(value, list) else value:,.0f} s"

    rows = [
        (label, seconds(stored[f"{key}_s"]), seconds(stored[f"{key}_cpu_s"]))
        for label, key in labels.items()
    ]
    return as_table(("", "time, median", "CPU time"), rows)


def startup() -> str:
    """Return how soon a known task answers, from startup.py."""
    labels = {
        "`mlx_lm.generate`": "mlx_lm.generate",
        "`ifp generate --task`": "ifp generate",
        "`ifp chat --task`, message from a pipe": "ifp chat",
    }
    stored = read(RESULTS / "startup.json")["rows"]
    rows = []
    for label, key in labels.items():
        first = stored[key]["first_token_s"]
        rows.append(
            (
                label,
                f"{statistics.median(first):.2f} s",
                f"{min(first):.2f} to {max(first):.2f}",
                f"{stored[key]['ratio']:.2f}",
                f"{stored[key]['cpu_s']:.2f} s",
            )
        )
    head = ("process", "first token, median", "spread", "ratio to mlx_lm.generate", "CPU time")
    return as_table(head, rows)


def merges() -> str:
    """Return how often everyday descriptions would share a sub-network, from task_merges.py."""
    first, second = read(RESULTS / "task-merges.json")["amounts"]

    def cells(amount: dict[str, Any], threshold: float) -> list[str]:
        (row,) = (row for row in amount["merges"] if row["threshold"] == threshold)
        return [" to ".join(map(str, sorted(set(row[kind])))) for kind in ("right", "wrong")]

    rows = [
        (f"{threshold:.2f}", *cells(first, threshold), *cells(second, threshold))
        for threshold in REUSE
    ]
    amounts = [amount["num_kept_units"] for amount in (first, second)]
    head = (
        "`--reuse`", f"{amounts[0]} units (the default): the same task, of 44",
        "another task, of 88", f"{amounts[1]} units: the same task", "another task",
    )  # fmt: skip
    return as_table(head, rows)


def pairs() -> str:
    """Return overlaps of paraphrases and of different tasks."""

    def row(label: str, kept: int, overlaps: Sequence[float]) -> tuple[str, ...]:
        values = (min(overlaps), statistics.mean(overlaps), max(overlaps))
        return (label, str(kept), *(f"{value:.3f}" for value in values))

    rows = []
    for found in read(RESULTS / "task-pairs.json")["results"]:
        kept, overlaps = found["num_kept_units"], found["overlaps"]
        rows.append(
            row(f"{len(overlaps['paraphrases'])} paraphrases", kept, overlaps["paraphrases"])
        )
        rows.append(
            row(f"{len(overlaps['different'])} different tasks", kept, overlaps["different"])
        )
    everyday = read(RESULTS / "task-merges.json")["amounts"][0]
    same: list[float] = []
    different: list[float] = []
    for one, overlaps in enumerate(everyday["overlaps"]):
        for other, overlap in enumerate(overlaps):
            (same if one // 2 == other // 2 else different).append(overlap)
    rows.append(row("everyday, same task", everyday["num_kept_units"], same))
    rows.append(row("everyday, different tasks", everyday["num_kept_units"], different))
    return as_table(("pairs", "units kept", "overlap: lowest", "mean", "highest"), rows)


def drift_by_domain() -> str:
    """Return what messages have in common with tasks' sub-networks, from drift.py."""
    rows = []
    for domain, found in read(RESULTS / "drift.json")["domains"].items():
        own, others = found["own"], found["others"]
        values = (min(own), statistics.mean(own), statistics.mean(others), max(others))
        rows.append((domain, *(f"{value:.3f}" for value in values)))
    head = ("messages of", "own task, lowest", "own task, mean", "other tasks, mean", "highest")
    return as_table(head, rows)


def drift_thresholds() -> str:
    """Return which messages each threshold of ``--drift`` reports."""
    domains = read(RESULTS / "drift.json")["domains"].values()

    def reported(kind: str, threshold: float) -> str:
        values = [value for found in domains for value in found[kind]]
        count = sum(value < threshold for value in values)
        return f"{count} of {len(values)} ({100 * count / len(values):.0f} %)"

    rows = [
        (f"{threshold:.2f}", reported("own", threshold), reported("others", threshold))
        for threshold in DRIFT
    ]
    return as_table(("threshold", "own task reported", "other tasks reported"), rows)


def switches() -> str:
    """Return what reading a conversation again after a switch is worth, from switch_kv.py."""
    stored = read(RESULTS / "switch-kv.json")["rows"]
    rows = []
    for switch in dict.fromkeys(row["switch"] for row in stored):
        some = [row for row in stored if row["switch"] == switch]
        mean = {
            key: statistics.mean(row[key] for row in some)
            for key in ("kept", "rebuilt", "history_tokens", "rebuild_s")
        }
        rows.append(
            (
                switch,
                f"{mean['kept']:.3f}",
                f"{mean['rebuilt']:.3f}",
                f"{mean['history_tokens']:.0f}",
                f"{mean['rebuild_s']:.2f}",
            )
        )
    head = ("switch", "cross-entropy, kept", "rebuilt", "history tokens", "seconds to rebuild")
    return as_table(head, rows)


TABLES: dict[str, Table] = {
    "first message": first_message,
    "lines": lines,
    "startup": startup,
    "merges": merges,
    "pairs": pairs,
    "drift by domain": drift_by_domain,
    "drift thresholds": drift_thresholds,
    "switches": switches,
}

if __name__ == "__main__":
    sys.exit(run({"docs/chat.md": TABLES}))
