"""After a switch of task: keep the keys and values of the former sub-network, or read again?

A conversation about one task (a question and its answer) is read by that task's sub-network; then
another task's sub-network goes on with a question and its known answer. Reported: cross-entropy of
that answer with the former keys and values and with rebuilt ones, and the seconds that rebuilding
takes. The last line is the result as JSON.

    python benchmarks/switch_kv.py eval --model smollm2-135m --examples 4
"""

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import argparse  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, cast  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

import ifp_mlx  # noqa: E402
from ifp_mlx.assistant import Assistant  # noqa: E402
from ifp_mlx.benchmarking.timing import machine  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402

DESCRIPTIONS = Path(ifp_mlx.__file__).parent / "data" / "task_descriptions.json"
SWITCHES = (("coding", "math"), ("math", "coding"), ("sql", "writing"), ("writing", "sql"))
MAX_CHARACTERS = 1200  # of a prompt or an answer, so that four fit any context


def examples(data: Path, domain: str, count: int) -> list[dict[str, str]]:
    """Return the first records of a domain that are not too long."""
    with (data / f"{domain}.jsonl").open() as file:
        records = (json.loads(line) for line in file)
        short = (r for r in records if len(r["prompt"]) + len(r["response"]) < MAX_CHARACTERS)
        return [next(short) for _ in range(count)]


def messages(record: dict[str, str]) -> list[dict[str, str]]:
    """Return a question and its answer."""
    return [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["response"]},
    ]


def read(model: nn.Module, ids: list[int]) -> tuple[list[Any], float]:
    """Return a KV cache that holds ``ids`` and the seconds it took to fill."""
    kv_cache: list[Any] = make_prompt_cache(model)
    start = time.perf_counter()
    model(mx.array([ids]), cache=kv_cache)
    mx.eval([layer.state for layer in kv_cache])
    return kv_cache, time.perf_counter() - start


def cross_entropy(model: nn.Module, kv_cache: list[Any], ids: list[int], num_targets: int) -> float:
    """Return the mean over the last ``num_targets`` of ``ids``, read after the KV cache."""
    logits = model(mx.array([ids[:-1]]), cache=kv_cache)[0, -num_targets:]
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), mx.array(ids[-num_targets:]))
    return cast(float, losses.mean().item())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with one DOMAIN.jsonl a domain")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--examples", type=int, default=4, help="of each switch")
    arguments = parser.parse_args()
    assistant = Assistant.load(resolve_model(arguments.model))
    kept, tokenizer = assistant.default_num_kept_units, assistant.tokenizer
    descriptions = json.loads(DESCRIPTIONS.read_text())

    def token_ids(conversation: list[dict[str, str]], **options: bool) -> list[int]:
        return list(tokenizer.apply_chat_template(conversation, return_dict=False, **options))

    rows = []
    for former_task, task in SWITCHES:
        former = assistant.subnetwork_for_task(descriptions[former_task], kept).model
        current = assistant.subnetwork_for_task(descriptions[task], kept).model
        olds = examples(arguments.data, former_task, arguments.examples)
        news = examples(arguments.data, task, arguments.examples)
        for old, new in zip(olds, news, strict=True):
            history = token_ids(messages(old))
            whole = token_ids([*messages(old), *messages(new)])
            question = token_ids([*messages(old), messages(new)[0]], add_generation_prompt=True)
            num_targets = len(whole) - len(question)
            kept_kv, _ = read(former, history)
            rebuilt_kv, rebuild_s = read(current, history)
            rows.append(
                {
                    "switch": f"{former_task} to {task}",
                    "history_tokens": len(history),
                    "rebuild_s": rebuild_s,
                    "kept": cross_entropy(current, kept_kv, whole[len(history) :], num_targets),
                    "rebuilt": cross_entropy(
                        current, rebuilt_kv, whole[len(history) :], num_targets
                    ),
                }
            )
    print(f"{assistant.files.selector}, K = {kept}, {len(rows)} switches\n")
    print("| switch | cross-entropy, kept | rebuilt | history tokens | seconds to rebuild |")
    print("|---|---|---|---|---|")
    for switch in dict.fromkeys(row["switch"] for row in rows):
        some = [row for row in rows if row["switch"] == switch]
        mean = {
            n: sum(cast(float, r[n]) for r in some) / len(some) for n in some[0] if n != "switch"
        }
        print(
            f"| {switch} | {mean['kept']:.3f} | {mean['rebuilt']:.3f} "
            f"| {mean['history_tokens']:.0f} | {mean['rebuild_s']:.2f} |"
        )
    print(json.dumps({**machine(), "num_kept_units": kept, "rows": rows}))


if __name__ == "__main__":
    main()
