"""Write the tables of docs/server.md from stored results; ``--check`` only compares."""

import statistics
import sys

from page_tables import RESULTS, Table, as_table, read, run

MODELS = {
    "smollm2-135m": "smollm2-135m",
    "random": "random weights, 2 layers, D = 256",
}
SAMPLES = 10  # of memory, one a second


def load() -> str:
    """Return what became of many clients' requests, from server_load.py."""
    stored = read(RESULTS / "server-load.json")
    rows = []
    for key, label in MODELS.items():
        found = stored[key]
        outcomes, memory = dict(found["outcomes"]), found["rss_mb"]
        right, cancelled = outcomes.pop("right"), outcomes.pop("cancelled")
        ends = [statistics.mean(part) for part in (memory[:SAMPLES], memory[-SAMPLES:])]
        rows.append(
            (
                f"{label}, {found['max_tokens']} tokens",
                str(right),
                str(cancelled),
                str(sum(outcomes.values())),
                f"{found['latency_p50_s']:.1f} s, {found['latency_p95_s']:.1f} s",
                ", ".join(f"{value:.0f}" for value in (*ends, max(memory))) + " MB",
                str(found["server_exit_code"]),
            )
        )
    head = (
        "model", "answers, all right", "left by their clients", "wrong, lost, failed, mixed",
        "median, 95th percentile", "resident memory: first, last ten seconds, most",
        "exit after SIGTERM",
    )  # fmt: skip
    return as_table(head, rows)


def conversations() -> str:
    """Return what several conversations at once take, from server_conversations.py."""
    found = read(RESULTS / "server-conversations.json")
    rows = [
        (
            "the whole model" if who == "whole" else "95 % of the FFN units",
            ", ".join(f"{value:.1f}" for value in speeds),
            "" if who == "whole" else f"{found['task_to_whole']:.2f}",
        )
        for who, speeds in found["tokens_per_s"].items()
    ]
    return as_table(("answers are written by", "tokens a second, round by round", "ratio"), rows)


TABLES: dict[str, Table] = {"load": load, "conversations": conversations}

if __name__ == "__main__":
    sys.exit(run({"docs/server.md": TABLES}))
