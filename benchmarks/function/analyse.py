"""Tables of a run: function against the whole model, and which cheap figure foretells it.

    python analyse.py OUT [OUT ...] [--baseline whole] [--fidelity mbpp,math]
    python analyse.py ../results/function/qwen2.5-coder-0.5b.jsonl.xz      # the rows of the docs

OUT is the folder of a run or a file of rows. Prints Markdown. Differences are paired by item, with
a 95 % bootstrap interval over items; turns of one conversation are drawn together. Correlations
are Spearman's over the rows whose names begin with ``fidelity/``, between each figure and the score
of the same sets. The last table asks what a user needs to know: from which value of a figure on is
function lost, whatever was done to the model?
"""

import argparse
import dataclasses
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Line = dict[str, Any]
Floats = npt.NDArray[np.float64]

NUM_DRAWS = 10_000
LEAST_SCORE = 0.1
"""Where the whole model gets less right, there is nothing to lose."""
HIGHER_IS_BETTER = frozenset(
    ("agreement", "target_right", "acceptance", "tokens_to_sure_flip_mean",
     "tokens_to_sure_flip_median", "answers_without_sure_flip", "tokens_to_flip_mean",
     "tokens_to_flip_median", "answers_without_flip", "survival_sure", "survival_accepted",
     "survival_accepted_geometric", "answer_log_ratio", "survival_ratio", "same_8", "same_16",
     "same_32", "same_64", "same_whole_answer", "same_tokens_mean", "same_tokens_median")
)  # fmt: skip
_NOT_CANDIDATES = frozenset(("num_answers", "num_tokens", "cross_entropy_whole"))


def main() -> None:
    """Print the tables of the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="+")
    parser.add_argument("--baseline", default="whole")
    parser.add_argument("--fidelity", default="mbpp,math", help="sets that are function")
    arguments = parser.parse_args()
    lines = load(arguments.out)
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        print(f"\n## {model}\n")
        print(function_table(own, arguments.baseline))
        print(f"\n### {model}: depth of the fact\n\n{depth_table(own)}")
        print(f"\n### {model}: teacher-forced, against the whole model\n\n{forced_table(own)}")
        rows = [
            x
            for x in own
            if x["row"]["name"].startswith(("fidelity/", f"{arguments.baseline}/"))
            or x["row"]["name"] == arguments.baseline
        ]
        if len({line["row"]["name"] for line in rows}) > 4:
            sets = arguments.fidelity.split(",")
            print(f"\n### {model}: fidelity rows\n\n{fidelity_table(rows, sets)}")
            print(f"\n### {model}: rank correlation with function\n")
            print(correlation_table(rows, sets))
        print(
            f"\n### {model}: function by what changed\n\n{changed_table(own, arguments.baseline)}"
        )


def load(folders: Sequence[Path]) -> list[Line]:
    """Return the lines of some runs; of rows that are in several, the last."""
    lines: dict[str, Line] = {}
    for path in folders:
        name = path / "rows.jsonl" if path.is_dir() else path
        with lzma.open(name) if name.suffix == ".xz" else name.open("rb") as file:
            for text in file:
                line = json.loads(text)
                lines[line["key"]] = line
    return list(lines.values())


def paired_difference(
    row: dict[str, float], baseline: dict[str, float]
) -> tuple[float, float, float, int, int]:
    """Return mean difference, its 95 % interval, and how many items were lost and won.

    Args:
        row: name of the item (``conversation/turn``) -> outcome.
        baseline: the same of the row to compare with.
    """
    names = sorted(row.keys() & baseline.keys())
    differences = np.array([row[name] - baseline[name] for name in names])
    _, groups = np.unique([name.split("/")[0] for name in names], return_inverse=True)
    counts = np.bincount(groups).astype(np.float64)
    sums = np.bincount(groups, differences)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(counts), (NUM_DRAWS, len(counts)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    lost, won = int((differences < -1e-9).sum()), int((differences > 1e-9).sum())
    if not lost and not won:  # nothing to draw from: the rule of three
        low, high = -3 / len(counts), 3 / len(counts)
    return float(differences.mean()), float(low), float(high), lost, won


def function_table(lines: Sequence[Line], baseline: str) -> str:
    """Return a Markdown table: rows by sets, score and paired difference in points."""
    by = {(line["row"]["name"], line["set"]): line for line in lines if line["outcomes"]}
    sets = list(dict.fromkeys(name for _, name in by))
    rows = list(dict.fromkeys(name for name, _ in by))
    table = [["row", *sets], ["---"] * (len(sets) + 1)]
    for row in rows:
        cells = [row]
        for set_name in sets:
            line, base = by.get((row, set_name)), by.get((baseline, set_name))
            if line is None or base is None:
                cells.append("")
            elif row == baseline:
                cells.append(f"**{100 * line['score']:.1f}** (n={len(line['outcomes'])})")
            else:
                mean, low, high, lost, won = paired_difference(line["outcomes"], base["outcomes"])
                cells.append(
                    f"{100 * line['score']:.1f} ({100 * mean:+.1f}, {100 * low:+.1f} to "
                    f"{100 * high:+.1f}; -{lost} +{won})"
                )
        table.append(cells)
    return _markdown(table)


def depth_table(lines: Sequence[Line]) -> str:
    """Return facts found by depth, for sets whose items are named by depth."""
    found = [line for line in lines if line["set"].startswith("needle")]
    depths = sorted({name.rsplit("-", 1)[0] for line in found for name in line["outcomes"]})
    table = [["row", "set", *depths], ["---"] * (len(depths) + 2)]
    for line in found:
        scores = [
            [v for name, v in line["outcomes"].items() if name.startswith(depth + "-")]
            for depth in depths
        ]
        cells = [f"{sum(values):.0f}/{len(values)}" for values in scores]
        table.append([line["row"]["name"], line["set"], *cells])
    return _markdown(table)


def forced_table(lines: Sequence[Line]) -> str:
    """Return how near each row is to the whole model on given answers, set by set."""
    shown = ("agreement", "kl", "cross_entropy_added", "sure_flips_per_100", "answers_without_flip")
    table = [["row", "set", "answers", *shown], ["---"] * (len(shown) + 3)]
    for line in lines:
        for kind in ("own", "reference"):
            if kind in line and line["row"]["name"] != "whole":
                cells = [f"{line[kind][name]:.4f}" for name in shown]
                table.append([line["row"]["name"], line["set"], kind, *cells])
    return _markdown(table)


def fidelity_table(lines: Sequence[Line], sets: Sequence[str]) -> str:
    """Return bits, kept units, bytes and scores of each fidelity row."""
    table = [["row", "bits", "kept", "MB", *sets], ["---"] * (len(sets) + 4)]
    for name in dict.fromkeys(line["row"]["name"] for line in lines):
        own = {line["set"]: line for line in lines if line["row"]["name"] == name}
        first = next(iter(own.values()))
        part = first["row"]["part"]
        size = f"{first['part_bytes'] / 1e6:.0f}" if first["part_bytes"] else ""
        scores = [f"{100 * own[s]['score']:.1f}" if s in own else "" for s in sets]
        kept = f"{first['kept_units'] / first['units']:.3f}"
        table.append([name, str(part["bits"]), kept, size, *scores])
    return _markdown(table)


def correlation_table(lines: Sequence[Line], sets: Sequence[str]) -> str:
    """Return Spearman's correlation of each candidate with function, for each set and in all.

    The sign is turned so that 1 means: the better the figure, the better the function. Rows that
    differ only in units and rows that differ only in bits are also shown apart: a figure that
    ranks one kind of damage well may still not compare the two.
    """
    groups: dict[str, Callable[[Line], bool]] = {
        "all": lambda line: True,
        "16 bits": lambda line: line["row"]["part"]["bits"] == 16,
        "all units": lambda line: line["row"]["part"]["kept"] == 1,
    }
    header = [f"{set_name}: {group}" for set_name in sets for group in groups]
    found: dict[str, list[float]] = {}
    names = [
        (kind, name)
        for kind in ("own", "reference", "free_running")
        for name in dict.fromkeys(n for line in lines for n in line.get(kind, {}))
        if name not in _NOT_CANDIDATES
    ]
    for kind, name in names:
        values = []
        for set_name in sets:
            for belongs in groups.values():
                chosen = [
                    line
                    for line in lines
                    if line["set"] == set_name
                    and line["row"]["name"] != "whole"
                    and name in line.get(kind, {})
                    and belongs(line)
                ]
                sign = 1 if name in HIGHER_IS_BETTER else -1
                figures = [sign * line[kind][name] for line in chosen]
                values.append(spearman(figures, [line["score"] for line in chosen]))
        found[f"{kind}.{name}"] = values
    over_all = {name: float(np.mean(values[:: len(groups)])) for name, values in found.items()}
    order = sorted(found, key=lambda name: -np.nan_to_num(over_all[name], nan=-2))
    table = [["figure", *header], ["---"] * (len(header) + 1)]
    table += [[name, *(f"{value:.3f}" for value in found[name])] for name in order]
    return _markdown(table)


@dataclasses.dataclass(frozen=True)
class Changed:
    """A row and set by what changed in it, and what of the function is left.

    Attributes:
        line: of the results.
        changed: of 100 tokens sampled where the whole model was, on its own answers, how many
            would be others.
        difference: from the whole model, paired by item; ``low`` to ``high`` with 95 %.
        low: see ``difference``.
        high: see ``difference``.
        left: share of the whole model's score.
    """

    line: Line
    changed: float
    difference: float
    low: float
    high: float
    left: float


def changed_lines(lines: Sequence[Line], baseline: str) -> list[Changed]:
    """Return every row and set but the whole model's, the least changed first."""
    base = {line["set"]: line for line in lines if line["row"]["name"] == baseline}
    found = []
    for line in lines:
        whole = base[line["set"]]
        if "own" not in line or not line["outcomes"] or whole["score"] < LEAST_SCORE:
            continue
        if not line["row"]["name"].startswith(baseline + "/") and line is not whole:
            mean, low, high, *_ = paired_difference(line["outcomes"], whole["outcomes"])
            left = line["score"] / whole["score"]
            changed = 100 * (1 - line["own"]["acceptance"])
            found.append(Changed(line, changed, mean, low, high, left))
    return sorted(found, key=lambda row: row.changed)


def pooled_correlation(found: Sequence[Changed], kind: str, name: str) -> float:
    """Return Spearman's correlation of a figure with the share of function that is left."""
    sign = 1 if name in HIGHER_IS_BETTER else -1
    return spearman([sign * row.line[kind][name] for row in found], [row.left for row in found])


def changed_table(lines: Sequence[Line], baseline: str) -> str:
    """Return every row and set by what changed, and pooled correlations over all of them."""
    found = changed_lines(lines, baseline)
    table = [["changed", "row", "set", "points", "left"], ["---"] * 5]
    for row in found:
        points = f"{100 * row.difference:+.1f} ({100 * row.low:+.1f} to {100 * row.high:+.1f})"
        name, set_name = row.line["row"]["name"], row.line["set"]
        table.append([f"{row.changed:.2f}", name, set_name, points, f"{row.left:.0%}"])
    values = {
        f"{kind}.{name}": pooled_correlation(found, kind, name)
        for kind in ("own", "free_running")
        for name in (found[0].line[kind] if found else ())
        if name not in _NOT_CANDIDATES
    }
    pooled = [["figure", "pooled"], ["---"] * 2]
    order = sorted(values, key=lambda name: -np.nan_to_num(values[name], nan=-2))
    pooled += [[name, f"{values[name]:.3f}"] for name in order]
    return f"{_markdown(table)}\n\n{_markdown(pooled)}"


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; nan where undefined."""
    a, b = np.array(first, np.float64), np.array(second, np.float64)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts - 1) / 2)[inverse]).astype(np.float64)


def _markdown(table: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


if __name__ == "__main__":
    main()
