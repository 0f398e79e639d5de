"""Draw the pictures of docs/latency.md, or print the tables of that page, from the suite's results.

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
RESULTS = ROOT / "benchmarks" / "results" / "latency"
PICTURE = ROOT / "docs" / "latency-growth.png"
MIXTURE_PICTURE = ROOT / "docs" / "latency-mixture.png"

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


def draw_prompts(axes: Axes) -> None:
    """Draw growth with the prompt."""
    lines(axes, read("8b-bf16")["rows"], "prompt_tokens")
    axes.set_xlabel("prompt tokens")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("prompt (K = 1536 of 14336)")


def draw_units(axes: Axes) -> None:
    """Draw growth with the FFN units kept."""
    lines(axes, read("8b-bf16-units")["rows"], "num_kept_units")
    axes.set_xlabel("FFN units kept, of 14336")
    axes.set_title("K (4096 prompt tokens)")


def draw_tasks(axes: Axes) -> None:
    """Draw growth with the number of tasks at hand."""
    rows = read("switch-8b-bf16")["rows"]
    tasks = [row["num_tasks"] for row in rows]
    labels = {
        "stay": "same task",
        "resident": "switch, resident",
        "indices": "switch, indices on disk",
        "anew": "new task",
    }
    for key, label in labels.items():
        times = [row[key]["median_s"] * 1e3 for row in rows]
        axes.plot(tasks, times, marker="o", label=label)
    axes.set_xlabel("tasks at hand")
    axes.set_ylabel("time to first token, ms (64 prompt tokens)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    memory = axes.twinx()
    memory.plot(tasks, [row["num_tasks"] * row["task_bytes"] / 1e9 for row in rows], "k--")
    memory.set_ylabel("memory of all tasks, GB (dashed)")
    memory.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_title("tasks")


def draw_mixture() -> None:
    """Write the picture of a mixture cut to half of its experts: memory, prompt, decoding."""
    content = read("30b-a3b-4bit")
    rows = {row["name"]: row for row in content["rows"]}
    shown = {
        latency.DENSE: "all 128 experts",
        latency.SMALL: "built with 64",
        latency.PER_TASK: "cut to 64",
    }
    panels = {
        "memory, GB": lambda row: row["peak_memory_bytes"] / 1e9,
        "time to first token, s": lambda row: row["ttft"]["median_s"],
        "tokens/s": lambda row: row["tokens_per_s"],
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(10, 2.6), dpi=110)
    for one, (title, value) in zip(axes, panels.items(), strict=True):
        bars = one.barh(
            list(shown.values()),
            [value(rows[name]) for name in shown],
            color=[COLORS[name] for name in shown],
        )
        one.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        one.margins(x=0.15)
        one.invert_yaxis()
        one.set_title(title, fontsize=9)
        one.spines[["top", "right"]].set_visible(False)
    machine = content["machine"]
    figure.suptitle(
        f"Qwen3-30B-A3B shape, 4 bits, 4096 prompt tokens, "
        f"{machine['device']}, mlx {machine['mlx']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(MIXTURE_PICTURE)


def draw() -> None:
    """Write the picture: growth with the prompt, with K where it was swept, and with tasks."""
    panels = [draw_prompts, draw_tasks]
    units = read("8b-bf16-units")["rows"]
    if len({row["num_kept_units"] for row in units}) > 2:
        panels.insert(1, draw_units)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.2), dpi=130)
    for panel, one in zip(panels, axes, strict=True):
        panel(one)
    machine = read("8b-bf16")["machine"]
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
        draw_mixture()


if __name__ == "__main__":
    main()
