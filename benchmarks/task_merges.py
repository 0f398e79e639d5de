r"""Would everyday descriptions share a sub-network that is not theirs?

``everyday_tasks.json`` has a task a line, in two wordings. What each wording selects is compared
with what all others do; then all are added in several orders, and each takes the units of the
closest one before it if they have more than a threshold in common, as ``--reuse`` does. A merge
is wrong if the two are not wordings of one task. The overlaps are stored, so that the test in
tests/subnets/test_task_merges.py counts the same merges without a model.

    python benchmarks/task_merges.py --model smollm2-135m --keep-units 768 384 \
        --output benchmarks/results/task-merges.json
"""

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import argparse  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ifp_mlx.assistant import Assistant  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402

TASKS = Path(__file__).with_name("everyday_tasks.json")
THRESHOLDS = (0.8, 0.85, 0.9, 0.92, 0.95)
NUM_ORDERS = 20


def overlaps_of(
    assistant: Assistant, texts: Sequence[str], num_kept_units: int
) -> list[list[float]]:
    """Return, for each text, the share of units in common with each of those before it."""
    selections = [assistant.select_for(text, num_kept_units) for text in texts]
    return [
        [round(selection.mean_overlap(earlier), 4) for earlier in selections[:index]]
        for index, selection in enumerate(selections)
    ]


def count_merges(
    overlaps: Sequence[Sequence[float]], order: Sequence[int], threshold: float
) -> tuple[int, int]:
    """Return how many texts would take the units of their own task's other wording, and of another.

    Args:
        overlaps: of each text with those before it; texts 2n and 2n + 1 are of one task.
        order: in which they are added.
        threshold: at which the closest one's units are taken.
    """
    right = wrong = 0
    cached: list[int] = []
    for text in order:
        close = {other: overlaps[max(text, other)][min(text, other)] for other in cached}
        nearest = max(close, key=lambda other: close[other], default=None)
        if nearest is None or close[nearest] < threshold:
            cached.append(text)  # with units of its own
        elif nearest // 2 == text // 2:
            right += 1
        else:
            wrong += 1
    return right, wrong


def orders_of(num_texts: int) -> list[list[int]]:
    """Return the file's order, its reverse, and random ones."""
    first = list(range(num_texts))
    shuffled = [random.Random(seed).sample(first, num_texts) for seed in range(NUM_ORDERS - 2)]
    return [first, first[::-1], *shuffled]


def summarise(overlaps: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Return, for each threshold, the fewest and most merges of both kinds over all orders."""
    rows = []
    for threshold in THRESHOLDS:
        counts = [count_merges(overlaps, order, threshold) for order in orders_of(len(overlaps))]
        right, wrong = zip(*counts, strict=True)
        rows.append(
            {
                "threshold": threshold,
                "right": [min(right), max(right)],
                "wrong": [min(wrong), max(wrong)],
            }
        )
    return rows


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep-units", type=int, nargs="+", default=[768, 384])
    parser.add_argument("--output", "-o", type=Path)
    arguments = parser.parse_args()
    tasks = json.loads(TASKS.read_text(encoding="utf-8"))
    texts = [wording for task in tasks for wording in task]
    assistant = Assistant.load(resolve_model(arguments.model))
    result: dict[str, Any] = {
        "benchmark": "task_merges",
        "model": arguments.model,
        "selector": str(assistant.files.selector),
        "texts": texts,
        "num_orders": NUM_ORDERS,
        "amounts": [],
    }
    for num_kept_units in arguments.keep_units:
        overlaps = overlaps_of(assistant, texts, num_kept_units)
        rows = summarise(overlaps)
        same = [row[-1] for row in overlaps[1::2]]
        different = [
            overlap
            for index, row in enumerate(overlaps)
            for other, overlap in enumerate(row)
            if other // 2 != index // 2
        ]
        print(f"\n{result['selector']}, {num_kept_units} of {assistant.num_units} units")
        for name, values in (("one task", same), ("different", different)):
            mean = sum(values) / len(values)
            print(f"{name}: {min(values):.3f} to {max(values):.3f}, mean {mean:.3f}")
        print("\n| --reuse | right merges | wrong merges |\n|---|---|---|")
        for row in rows:
            right, wrong = ("{} to {}".format(*row[kind]) for kind in ("right", "wrong"))
            print(f"| {row['threshold']} | {right} of {len(tasks)} | {wrong} |")
        result["amounts"].append(
            {"num_kept_units": num_kept_units, "overlaps": overlaps, "merges": rows}
        )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
