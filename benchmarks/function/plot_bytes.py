"""Draw function against memory: a whole model at fewer bits, and parts of it.

    python plot_bytes.py ../results/function/qwen2.5-coder-0.5b.jsonl.xz ../../docs/equal-bytes.png

From the rows whose names begin with ``fidelity/``, on two sets.
"""

import argparse
from pathlib import Path

import matplotlib
from analyse import Line, load
from matplotlib.axes import Axes

matplotlib.use("Agg")
from matplotlib import pyplot

SETS = {"mbpp": "Python functions that pass their tests (MBPP)", "math": "word problems solved"}
PREFIX = "fidelity/"
WHOLE_BITS = 16
PART_COLOURS = {WHOLE_BITS: "tab:orange", 8: "tab:green", 4: "tab:red"}


def main() -> None:
    """Draw both sets beside each other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    lines = load([arguments.rows])
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
    for axes, (name, title) in zip(panels, SETS.items(), strict=True):
        chosen = [x for x in lines if x["set"] == name and _is_shown(x)]
        _draw(axes, [x for x in chosen if _kept(x) == 1], "whole model, fewer bits", "tab:blue")
        for bits, colour in PART_COLOURS.items():
            own = [x for x in chosen if x["row"]["part"]["bits"] == bits]
            _draw(axes, own, f"fewer FFN units, {bits} bits", colour)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("weights, MB")
        axes.set_ylim(0, 1.12 * max(100 * line["score"] for line in chosen))
    panels[0].set_ylabel("right, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False, fontsize=8)  # fmt: skip
    figure.savefig(arguments.picture, dpi=100)


def _is_shown(line: Line) -> bool:
    return bool(line["row"]["name"].startswith(PREFIX) or line["row"]["name"] == "whole")


def _kept(line: Line) -> float:
    return float(line["row"]["part"]["kept"])


def _draw(axes: Axes, lines: list[Line], label: str, colour: str) -> None:
    lines = sorted(lines, key=lambda line: line["part_bytes"])
    sizes = [line["part_bytes"] / 1e6 for line in lines]
    scores = [100 * line["score"] for line in lines]
    axes.plot(sizes, scores, "o-", color=colour, label=label, markersize=4)
    for line, size, score in zip(lines, sizes, scores, strict=True):
        bits, kept = line["row"]["part"]["bits"], _kept(line)
        is_part = kept < 1
        if is_part == (colour == "tab:blue") or (is_part and bits != WHOLE_BITS):
            continue  # a point that both lines have, or one where there is no room
        name = f"{kept:.0%}" if is_part else f"{bits} bits"
        place = (-24, -3) if is_part else (2, 5)
        axes.annotate(name, (size, score), place, textcoords="offset points", fontsize=7)


if __name__ == "__main__":
    main()
