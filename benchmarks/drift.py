"""How much do messages have in common with the sub-network of their own task, and of others?

For each domain with a task description, prompts of the evaluation data select units, which are
compared with those that the domain's own description and all others select: what a threshold for
``--drift`` can tell apart. The second table says how many messages it would report, those of the
task itself and those of others. The last line is the result as JSON.

    python benchmarks/drift.py eval --model smollm2-135m --prompts 8
"""

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import ifp_mlx  # noqa: E402
from ifp_mlx.assistant import Assistant  # noqa: E402
from ifp_mlx.benchmarking.timing import machine  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402

THRESHOLDS = (0.70, 0.75, 0.80)
DESCRIPTIONS = Path(ifp_mlx.__file__).parent / "data" / "task_descriptions.json"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with one DOMAIN.jsonl a domain")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep-units", type=int, default=None)
    parser.add_argument("--prompts", type=int, default=8, help="from each domain")
    arguments = parser.parse_args()
    assistant = Assistant.load(resolve_model(arguments.model))
    kept = arguments.keep_units or assistant.default_num_kept_units
    descriptions = {
        domain: text
        for domain, text in json.loads(DESCRIPTIONS.read_text()).items()
        if not domain.startswith("lm_") and (arguments.data / f"{domain}.jsonl").exists()
    }
    tasks = {domain: assistant.select_for(text, kept) for domain, text in descriptions.items()}
    rows = {}
    for domain in descriptions:
        with (arguments.data / f"{domain}.jsonl").open() as file:
            prompts = [json.loads(next(file))["prompt"] for _ in range(arguments.prompts)]
        selected = [assistant.select_for(prompt, kept) for prompt in prompts]
        own = [selection.mean_overlap(tasks[domain]) for selection in selected]
        others = [
            selection.mean_overlap(task)
            for selection in selected
            for other, task in tasks.items()
            if other != domain
        ]
        rows[domain] = {"own": own, "others": others}
    print(f"{assistant.files.selector}, K = {kept}, {arguments.prompts} prompts a domain\n")
    print("| messages of | own task, lowest | own task, mean | other tasks, mean | highest |")
    print("|---|---|---|---|---|")
    for domain, row in rows.items():
        own, others = row["own"], row["others"]
        print(
            f"| {domain} | {min(own):.3f} | {sum(own) / len(own):.3f} "
            f"| {sum(others) / len(others):.3f} | {max(others):.3f} |"
        )
    own = [value for row in rows.values() for value in row["own"]]
    others = [value for row in rows.values() for value in row["others"]]
    print("\n| threshold | own task reported | other tasks reported |")
    print("|---|---|---|")
    for threshold in THRESHOLDS:
        false = sum(value < threshold for value in own)
        found = sum(value < threshold for value in others)
        print(
            f"| {threshold:.2f} | {false} of {len(own)} ({false / len(own):.0%}) "
            f"| {found} of {len(others)} ({found / len(others):.0%}) |"
        )
    print(json.dumps({**machine(), "num_kept_units": kept, "domains": rows}))


if __name__ == "__main__":
    main()
