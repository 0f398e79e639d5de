"""Do two descriptions of one task select the same units, and those of two tasks not?

Prints the overlap of the sub-networks that pairs of paraphrases and pairs of different tasks
select, and how well the threshold of ``--reuse`` tells them apart. ``task_pairs.json`` has 15 of
either kind, ``task_pairs_second.json`` ten that no threshold was chosen by. The last line is the
result as JSON.

    python benchmarks/task_pairs.py --model smollm2-135m --keep-units 768 512
"""

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import argparse  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ifp_mlx.assistant import PREDICTED_REUSE_OVERLAP, Assistant  # noqa: E402
from ifp_mlx.benchmarking.timing import machine  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402
from ifp_mlx.selection.spec import SelectorSpec  # noqa: E402

PAIRS = Path(__file__).with_name("task_pairs.json")


def measure(
    assistant: Assistant, pairs_of: dict[str, Any], num_kept_units: int, threshold: float
) -> dict[str, Any]:
    """Return the overlaps of both kinds of pairs, the best threshold and what a given one does."""
    select = functools.cache(functools.partial(assistant.select_for, num_kept_units=num_kept_units))

    overlaps = {
        kind: [select(one).mean_overlap(select(other)) for one, other in pairs]
        for kind, pairs in pairs_of.items()
    }
    same, different = overlaps["paraphrases"], overlaps["different"]
    best = max(
        sorted(same + different),
        key=lambda t: sum(o >= t for o in same) + sum(o < t for o in different),
    )
    return {
        "num_kept_units": num_kept_units,
        "selector": str(assistant.files.selector),
        "overlaps": overlaps,
        "threshold": threshold,
        "best_threshold": best,
        "paraphrases_shared": sum(o >= threshold for o in same),
        "paraphrases_apart": sum(o < threshold for o in same),
        "different_shared": sum(o >= threshold for o in different),
        "different_apart": sum(o < threshold for o in different),
    }


def show(result: dict[str, Any]) -> None:
    """Print one result as a Markdown table."""
    print(f"\n{result['selector']}, K = {result['num_kept_units']}\n")
    threshold = result["threshold"]
    print(f"| pairs | lowest | mean | highest | share one at {threshold} | kept apart |")
    print("|---|---|---|---|---|---|")
    for kind in ("paraphrases", "different"):
        values = result["overlaps"][kind]
        print(
            f"| {kind} | {min(values):.3f} | {sum(values) / len(values):.3f} | {max(values):.3f} "
            f"| {result[f'{kind}_shared']} | {result[f'{kind}_apart']} |"
        )
    print(f"\nThreshold with the fewest mistakes: {result['best_threshold']:.3f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--selector", default=None)
    parser.add_argument("--keep-units", type=int, nargs="+", default=[1024])
    parser.add_argument("--pairs", type=Path, default=PAIRS)
    parser.add_argument("--threshold", type=float, default=PREDICTED_REUSE_OVERLAP)
    arguments = parser.parse_args()
    pairs_of = json.loads(arguments.pairs.read_text())
    spec = SelectorSpec.parse(arguments.selector) if arguments.selector else None
    assistant = Assistant.load(resolve_model(arguments.model), selector=spec)
    results = [
        measure(assistant, pairs_of, amount, arguments.threshold) for amount in arguments.keep_units
    ]
    for result in results:
        show(result)
    print(json.dumps({**machine(), "model": arguments.model, "results": results}))


if __name__ == "__main__":
    main()
