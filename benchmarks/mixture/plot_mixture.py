"""Draw what is lost over the share of experts kept, by criterion, from measure_mixture.py's file.

python plot_mixture.py OUT.json PICTURE.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from summarise_mixture import GENERIC, GROUPS, OFF_TASK, OWN, Results, pass_name

matplotlib.use("agg")
from matplotlib import pyplot

RANDOM = [(f"random{seed}", "sliced", 0) for seed in range(3)]
LINES: dict[str, tuple[list[tuple[str, str, int]], str, str]] = {
    "64 examples": ([OWN], "#1f6feb", "o-"),
    "64 examples, by frequency": ([("task64:frequency", "sliced", 0)], "#8250df", "o-"),
    "8 examples": ([("task8", "sliced", 0)], "#6cb6ff", "o-"),
    "description": ([("description", "sliced", 0)], "#2da44e", "o-"),
    "all text (generic)": ([GENERIC], "#c9a227", "o-"),
    "random": (RANDOM, "#8a8a8a", "o-"),
    "another task's 64 examples": ([OFF_TASK], "#cf222e", "o:"),
    "64 examples, zero slots": ([("task64", "zero", 0)], "#1f6feb", "x--"),
}
_LINEAR_BELOW = 0.1  # nats; above, the axis is logarithmic


def draw_group(axes: Axes, results: Results) -> None:
    """Draw one group of domains."""
    whole = results.mean("whole")
    for label, (rows, color, style) in LINES.items():
        points = {}
        for num_kept in results.amounts:
            means = [results.mean(pass_name(row, num_kept)) for row in rows]
            known = [mean for mean in means if mean is not None]
            if known:
                points[100 * num_kept / results.num_experts] = float(np.mean(known))
        if points and whole is not None:
            shares, lost = [100.0, *points], [0.0, *(mean - whole for mean in points.values())]
            axes.plot(shares, lost, style, color=color, label=label, markersize=4)
    axes.invert_xaxis()
    axes.set_yscale("symlog", linthresh=_LINEAR_BELOW, linscale=0.6)
    axes.set_ylim(-0.03, 20)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("experts kept, %")
    axes.set_ylabel("nats a token above the whole model")
    axes.grid(alpha=0.3)


def draw(content: dict[str, Any], picture: Path) -> None:
    """Write the picture."""
    groups = {group: Results(content, group) for group in GROUPS}
    groups = {group: results for group, results in groups.items() if results.domains}
    figure, panels = pyplot.subplots(
        1, len(groups), figsize=(5.5 * len(groups), 5), dpi=130, squeeze=False
    )
    for axes, (group, results) in zip(panels[0], groups.items(), strict=True):
        draw_group(axes, results)
        axes.set_title(f"{group} ({len(results.domains)} domains)")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    model = content["model"]
    figure.suptitle(
        f"A small mixture: {model['layers']} layers of {model['experts']} experts, "
        f"{model['top_k']} a token",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1))  # the legend is below
    figure.savefig(picture)


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.picture)


if __name__ == "__main__":
    main()
