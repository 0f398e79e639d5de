"""Draw function against memory: a whole model at fewer bits, and parts of it.

    python plot_bytes.py ../results/function/qwen2.5-coder-0.5b.jsonl ../../docs/equal-bytes.png

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


def main() -> None:
    """Draw both sets beside each other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    lines = load([arguments.rows])
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, (name, title) in zip(panels, SETS.items(), strict=True):
        chosen = [line for line in lines if line["set"] == name]
        _draw(axes, [x for x in chosen if _is_whole(x)], "whole model, fewer bits", "tab:blue")
        parts = [x for x in chosen if not _is_whole(x) or x["row"]["name"] == "whole"]
        _draw(axes, parts, "fewer FFN units, 16 bits", "tab:orange")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("weights, MB")
        axes.set_ylim(0, 1.12 * max(100 * line["score"] for line in chosen))
    panels[0].set_ylabel("right, %")
    panels[0].legend(frameon=False, fontsize=8, loc="center")
    figure.savefig(arguments.picture, dpi=100)


def _is_whole(line: Line) -> bool:
    return bool(line["kept_units"] == line["units"])


def _draw(axes: Axes, lines: list[Line], label: str, colour: str) -> None:
    own = [x for x in lines if x["row"]["name"].startswith(PREFIX) or x["row"]["name"] == "whole"]
    own.sort(key=lambda line: line["part_bytes"])
    sizes = [line["part_bytes"] / 1e6 for line in own]
    scores = [100 * line["score"] for line in own]
    axes.plot(sizes, scores, "o-", color=colour, label=label, markersize=4)
    for line, size, score in zip(own, sizes, scores, strict=True):
        part = line["row"]["part"]
        is_part = part["kept"] < 1
        if not is_part and colour != "tab:blue":
            continue  # the point that both lines have
        name = f"{part['kept']:.0%}" if is_part else f"{part['bits']} bits"
        place = (-24, -3) if is_part else (2, 5)
        axes.annotate(name, (size, score), place, textcoords="offset points", fontsize=7)


if __name__ == "__main__":
    main()
