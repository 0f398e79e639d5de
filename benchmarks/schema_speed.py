"""What does it cost to enforce a JSON schema while decoding? Speed with and without, in turns.

Both decode the same number of tokens after the same prompt with the same model, in turns in one
process, so that whatever else the machine does meets both. The last line is one JSON object.

    python benchmarks/schema_speed.py --model smollm2-135m --rounds 10 --tokens 48
"""

import argparse
import json
import platform
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before anything imports mlx.core

from mlx_lm.generate import stream_generate  # noqa: E402

from ifp_mlx.assistant import Assistant  # noqa: E402
from ifp_mlx.chat.grammar import Grammars  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "kind": {"enum": ["place", "person", "event"]},
        "years": {"type": "array", "items": {"type": "integer"}},
        "author": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "born": {"type": ["integer", "null"]}},
            "required": ["name", "born"],
            "additionalProperties": False,
        },
        "text": {"type": "string"},
    },
    "required": ["title", "kind", "years", "author", "text"],
    "additionalProperties": False,
}
QUESTION = "Write a long article about the history of Rome, as a JSON object."


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    assistant = Assistant.load(resolve_model(args.model))
    model, tokenizer = assistant.dense().model, assistant.tokenizer
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    start = time.perf_counter()
    grammar = Grammars(tokenizer).for_schema(SCHEMA)
    first_s = time.perf_counter() - start

    def tokens_per_s(enforced: bool) -> float:
        processors = [grammar.processor(512)] if enforced else []
        times = []
        for _ in stream_generate(
            model, tokenizer, prompt, max_tokens=512, logits_processors=processors
        ):
            times.append(time.perf_counter())
            if len(times) == args.tokens:
                break
        return (len(times) - 1) / (times[-1] - times[0])

    for enforced in (False, True):  # warm up
        tokens_per_s(enforced)
    rounds = [(tokens_per_s(False), tokens_per_s(True)) for _ in range(args.rounds)]
    free, enforced = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    print(f"{args.model}: {free:.1f} tokens/s, with the schema {enforced:.1f}; ratio {ratio:.3f}")
    record = {
        "model": args.model,
        "rounds": args.rounds,
        "tokens": args.tokens,
        "free_tps": round(free, 2),
        "enforced_tps": round(enforced, 2),
        "ratio": round(ratio, 4),
        "tokenizer_and_schema_s": round(first_s, 3),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "llguidance")},
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
