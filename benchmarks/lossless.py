"""Is lossless decoding the dense model's own, and how much of a draft does it accept?

Greedy answers to prompts of the evaluation data, by the dense model alone and by a sub-network's
drafts checked by it: the same text is asserted, the acceptance rate and the speeds are reported by
domain. The last line is the result as JSON.

    python benchmarks/lossless.py eval --model smollm2-135m --prompts 4 --max-tokens 200
"""

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ifp_mlx.assistant import Assistant  # noqa: E402
from ifp_mlx.chat.conversation import Conversation, SamplingOptions  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402

MAX_PROMPT_CHARACTERS = 1500


def answers(
    assistant: Assistant, prompt: str, kept: int, num_tokens: int, num_draft_tokens: int
) -> dict[str, Any]:
    """Return what both say to a prompt, and the measurements."""
    sampling = SamplingOptions(max_new_tokens=num_tokens)
    dense = assistant.dense().model
    draft = assistant.subnetwork_for_prompt(prompt, kept).model
    plain = Conversation(dense, assistant.tokenizer, assistant.context_length)
    checked = Conversation(
        dense,
        assistant.tokenizer,
        assistant.context_length,
        draft_model=draft,
        num_draft_tokens=num_draft_tokens,
    )
    expected = "".join(plain.reply(prompt, sampling))
    text = "".join(checked.reply(prompt, sampling))
    assert plain.stats is not None
    assert checked.stats is not None
    return {
        "equal": text == expected,
        "tokens": checked.stats.generated_tokens,
        "drafted": checked.stats.drafted_tokens,
        "accepted": checked.stats.accepted_tokens,
        "dense_tps": plain.stats.generation_tps,
        "lossless_tps": checked.stats.generation_tps,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with one DOMAIN.jsonl a domain")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--domains", nargs="+", default=["coding", "general", "math", "qa", "sql"])
    parser.add_argument("--prompts", type=int, default=4, help="from each domain")
    parser.add_argument("--keep-units", type=int, default=None)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    arguments = parser.parse_args()
    assistant = Assistant.load(resolve_model(arguments.model))
    kept = arguments.keep_units or assistant.default_num_kept_units
    rows: dict[str, list[dict[str, Any]]] = {}
    for domain in arguments.domains:
        with (arguments.data / f"{domain}.jsonl").open() as file:
            prompts = (json.loads(line)["prompt"] for line in file)
            short = [p for p in prompts if len(p) <= MAX_PROMPT_CHARACTERS][: arguments.prompts]
        options = (kept, arguments.max_tokens, arguments.num_draft_tokens)
        rows[domain] = [answers(assistant, prompt, *options) for prompt in short]
    print(
        f"{assistant.selector_name}, K = {kept}, {arguments.num_draft_tokens} drafted at a time\n"
    )
    print("| domain | equal to dense | tokens | accepted | dense tokens/s | lossless tokens/s |")
    print("|---|---|---|---|---|---|")
    for domain, results in rows.items():
        total = {name: sum(r[name] for r in results) for name in results[0]}
        count = len(results)
        print(
            f"| {domain} | {total['equal']} of {count} | {total['tokens']} "
            f"| {total['accepted'] / total['drafted']:.0%} | {total['dense_tps'] / count:.1f} "
            f"| {total['lossless_tps'] / count:.1f} |"
        )
    print(json.dumps({"num_kept_units": kept, "domains": rows}))


if __name__ == "__main__":
    main()
