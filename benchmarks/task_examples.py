"""What selects best for a task: its description, a few of its inputs too, or each input itself?

The adapter's sub-networks answer held-out instructions; each domain is a task. Inputs of the task
come from behind those that are scored. Reported: cross-entropy by domain. The last line is the
result as JSON.

    python benchmarks/task_examples.py eval --limit 15 --examples 8 --keep-units 512
"""

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import argparse  # noqa: E402
import json  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import mlx.core as mx  # noqa: E402

from ifp_mlx.assistant import Assistant  # noqa: E402
from ifp_mlx.benchmarking.timing import machine  # noqa: E402
from ifp_mlx.chat.chat_template import chat_ids  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402
from ifp_mlx.evaluation.quality import (  # noqa: E402
    DOCUMENT_PREFIX,
    HeldOutExample,
    evaluate,
    load_held_out,
    load_task_descriptions,
    mean_cross_entropy,
)
from ifp_mlx.evaluation.subject import TASK_DESCRIPTIONS  # noqa: E402
from ifp_mlx.selection.selectors import select  # noqa: E402
from ifp_mlx.selection.spec import SelectorSpec  # noqa: E402
from ifp_mlx.units.masks import with_unit_masks  # noqa: E402

WAYS = ("description", "examples", "input")


def main() -> None:
    """Print the mean and each domain, one way of selecting after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of held-out NAME.jsonl files")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=15, help="scored instructions a domain")
    parser.add_argument("--examples", type=int, default=8, help="inputs that select for a task")
    parser.add_argument("--keep-units", type=int, default=512)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    arguments = parser.parse_args()
    assistant = Assistant.load(resolve_model(arguments.model), selector=SelectorSpec("predictor"))
    adapter = assistant.files.adapter
    assert adapter is not None
    selector = assistant.selector()
    masked = with_unit_masks(adapter.apply(assistant.dense().model))
    tokenizer = assistant.tokenizer
    held_out = load_held_out(arguments.data, tokenizer, arguments.limit + arguments.examples)
    domains = {d: found for d, found in held_out.items() if not d.startswith(DOCUMENT_PREFIX)}
    scored = [example for found in domains.values() for example in found[: arguments.limit]]
    texts = load_task_descriptions(TASK_DESCRIPTIONS)
    descriptions = {
        domain: chat_ids(tokenizer, [{"role": "user", "content": texts[domain]}])
        for domain in domains
    }
    inputs = {
        domain: [example.prompt_ids for example in found[arguments.limit :]]
        for domain, found in domains.items()
    }

    def mask(ids: Sequence[int], examples: Sequence[Sequence[int]] = ()) -> mx.array:
        return select(selector, ids, arguments.keep_units, examples).pick.mask()

    def masks_of(way: str) -> dict[HeldOutExample, mx.array]:
        if way == "input":
            return {example: mask(example.prompt_ids) for example in scored}
        by_domain = {
            domain: mask(ids, inputs[domain] if way == "examples" else ())
            for domain, ids in descriptions.items()
        }
        return {example: by_domain[example.domain] for example in scored}

    results = {}
    for way in arguments.ways:
        masks = masks_of(way)

        def of_batch(
            batch: Sequence[HeldOutExample], masks: dict[HeldOutExample, mx.array] = masks
        ) -> mx.array:
            return mx.stack([masks[example] for example in batch])

        qualities = evaluate(masked, scored, of_batch)
        mean = mean_cross_entropy(qualities, documents=False)
        print(f"{way}: {mean:.4f}", flush=True)
        results[way] = {"mean": round(mean, 4)} | {
            domain: round(quality.cross_entropy, 4) for domain, quality in qualities.items()
        }
    settings = {name: getattr(arguments, name) for name in ("limit", "examples", "keep_units")}
    print(json.dumps({**machine(), **settings, "results": results}))


if __name__ == "__main__":
    main()
