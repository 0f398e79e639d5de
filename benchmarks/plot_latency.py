"""Draw docs/latency-growth.png from benchmarks/results/, or print the tables of docs/latency.md.

python benchmarks/plot_latency.py
python benchmarks/plot_latency.py --tables
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from ifp_mlx.benchmarking import latency, report

matplotlib.use("agg")
from matplotlib import pyplot

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "latency-growth.png"

Row = dict[str, Any]
COLORS = {
    latency.DENSE: "#8a8a8a",
    latency.SMALL: "#c9a227",
    latency.PER_INPUT: "#1f6feb",
    latency.PER_TASK: "#2da44e",
}
TABLES = {
    "latency": report.latency_table,
    "slicing": report.slicing_table,
    "switch": report.switch_table,
}


def read(name: str) -> dict[str, Any]:
    """Return the document of one job."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def lines(axes: Axes, rows: Sequence[Row], across: str) -> None:
    """Draw each model's time to the first token."""
    for name, color in COLORS.items():
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row[across])
        times = [row["ttft"]["median_s"] * 1e3 for row in own]
        axes.plot([row[across] for row in own], times, marker="o", color=color, label=name)
    axes.set_ylabel("time to first token, ms")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def draw() -> None:
    """Write the picture: growth with the prompt, with K and with the number of tasks."""
    prompts, units, switch = read("8b-bf16"), read("8b-bf16-units"), read("switch-8b-bf16")
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.2), dpi=130)
    lines(left, prompts["rows"], "prompt_tokens")
    left.set_xlabel("prompt tokens")
    left.legend(frameon=False, fontsize=8)
    left.set_title("prompt (K = 1536 of 14336)")
    lines(middle, units["rows"], "num_kept_units")
    middle.set_xlabel("FFN units kept, of 14336")
    middle.set_title("K (4096 prompt tokens)")
    rows = switch["rows"]
    tasks = [row["num_tasks"] for row in rows]
    labels = {
        "stay": "same task",
        "resident": "switch, resident",
        "indices": "switch, indices on disk",
        "anew": "new task",
    }
    for key, label in labels.items():
        times = [row[key]["median_s"] * 1e3 for row in rows]
        right.plot(tasks, times, marker="o", label=label)
    right.set_xlabel("tasks at hand")
    right.set_ylabel("time to first token, ms (64 prompt tokens)")
    right.set_ylim(bottom=0)
    right.grid(alpha=0.3)
    memory = right.twinx()
    memory.plot(tasks, [row["added_bytes"] / 1e9 for row in rows], "k--", label="memory")
    memory.set_ylabel("memory of all tasks, GB (dashed)")
    memory.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=8)
    right.set_title("tasks")
    machine = prompts["machine"]
    figure.suptitle(
        f"Llama-3.1-8B shape, bfloat16, {machine['device']}, mlx {machine['mlx']}", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(PICTURE)


def print_tables() -> None:
    """Print every job's table as Markdown."""
    for path in sorted(RESULTS.glob("*.json")):
        content = read(path.stem)
        if content.get("benchmark") in TABLES:
            print(f"\n### {path.stem}\n")
            print(TABLES[content["benchmark"]](content["rows"]))


def main() -> None:
    """Draw or print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true")
    if parser.parse_args().tables:
        print_tables()
    else:
        draw()


if __name__ == "__main__":
    main()
