"""Do two descriptions of one task select the same units, and those of two tasks not?

Prints the overlap of the sub-networks that 15 pairs of paraphrases and 15 pairs of different tasks
select, and how well a threshold on it tells them apart: what ``--reuse`` and ``--drift`` rest on.
The last line is the result as JSON.

    python benchmarks/task_pairs.py --model smollm2-135m --keep-units 1024 768
"""

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import argparse  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ifp_mlx.assistant import Assistant  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402
from ifp_mlx.selection import Selection  # noqa: E402

PAIRS = json.loads(Path(__file__).with_name("task_pairs.json").read_text())


def measure(assistant: Assistant, num_kept_units: int) -> dict[str, Any]:
    """Return the overlaps of both kinds of pairs and the threshold that tells most apart."""
    select = functools.cache(functools.partial(assistant.select_for, num_kept_units=num_kept_units))

    def overlap(one: Selection, other: Selection) -> float:
        return float(one.overlap(other).mean().item())  # type: ignore[arg-type]

    overlaps = {
        kind: [overlap(select(one), select(other)) for one, other in pairs]
        for kind, pairs in PAIRS.items()
    }
    same, different = overlaps["paraphrases"], overlaps["different"]
    best = max(
        sorted(same + different),
        key=lambda t: sum(o >= t for o in same) + sum(o < t for o in different),
    )
    return {
        "num_kept_units": num_kept_units,
        "selector": assistant.selector_name,
        "overlaps": overlaps,
        "threshold": best,
        "paraphrases_shared": sum(o >= best for o in same),
        "paraphrases_apart": sum(o < best for o in same),
        "different_shared": sum(o >= best for o in different),
        "different_apart": sum(o < best for o in different),
    }


def show(result: dict[str, Any]) -> None:
    """Print one result as a Markdown table."""
    print(f"\n{result['selector']}, K = {result['num_kept_units']}\n")
    print("| pairs | lowest | mean | highest | share one at threshold | kept apart |")
    print("|---|---|---|---|---|---|")
    for kind in ("paraphrases", "different"):
        values = result["overlaps"][kind]
        print(
            f"| {kind} | {min(values):.3f} | {sum(values) / len(values):.3f} | {max(values):.3f} "
            f"| {result[f'{kind}_shared']} | {result[f'{kind}_apart']} |"
        )
    print(f"\nThreshold with the fewest mistakes: {result['threshold']:.3f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--selector", default=None)
    parser.add_argument("--keep-units", type=int, nargs="+", default=[1024])
    arguments = parser.parse_args()
    assistant = Assistant.load(resolve_model(arguments.model), selector=arguments.selector)
    results = [measure(assistant, amount) for amount in arguments.keep_units]
    for result in results:
        show(result)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
