"""Compare a compact model with a dense model of the same shape that mlx-lm built directly.

    python benchmarks/compact_speed.py [--shape smollm2-135m] [--layers 8] [--keep-units 768]

Plain and quantized at 4 bits, decode (a token at a time) and prefill. The two models take turns
in one process, each going first in every other turn; a ratio is that of the medians, and above 1
the compact model is slower. On a CPU that other programs use too, ``--cpu-time`` counts the seconds
of this process's own threads instead of the clock's (with OPENBLAS_NUM_THREADS=1, because waiting
threads count). Ends with one JSON line.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

from ifp_mlx.blas import prefer_openblas

BLAS = prefer_openblas()  # before mlx is imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from ifp_mlx.benchmarking.shapes import build_model, find_shape  # noqa: E402
from ifp_mlx.benchmarking.timing import machine, measure  # noqa: E402
from ifp_mlx.selection.selectors import select_random  # noqa: E402
from ifp_mlx.slicing.compact import slice_model  # noqa: E402

GROUP_SIZE = 64
CONTEXT_TOKENS = 64
DECODED_TOKENS = 4


def make_decoder(model: nn.Module) -> Callable[[], mx.array]:
    """Return work that decodes a few tokens after a short context."""
    context = mx.arange(CONTEXT_TOKENS)[None] % 256

    def decode() -> mx.array:
        kv_cache = make_prompt_cache(model)
        token = mx.argmax(model(context[:, :1], cache=kv_cache)[:, -1], axis=-1)
        for _ in range(DECODED_TOKENS):
            token = mx.argmax(model(token[:, None], cache=kv_cache)[:, -1], axis=-1)
            mx.eval(token)
        return token

    return decode


def make_prefill(model: nn.Module, num_tokens: int) -> Callable[[], mx.array]:
    """Return work that reads a prompt."""
    tokens = mx.arange(num_tokens)[None] % 256
    return lambda: model(tokens, cache=make_prompt_cache(model))[:, -1]


def compare(
    ours: Callable[[], mx.array], theirs: Callable[[], mx.array], repeats: int, cpu_time: bool
) -> dict[str, float]:
    """Return medians in seconds and their ratio."""
    seconds: tuple[list[float], list[float]] = ([], [])
    works = (ours, theirs)
    for turn in range(repeats + 2):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            took = measure(works[which])[0]
            if cpu_time:
                took = time.process_time() - start
            if turn >= 2:
                seconds[which].append(took)
    medians = [statistics.median(values) for values in seconds]
    pairs = [a / b for a, b in zip(*seconds, strict=True)]
    return {
        "compact_s": medians[0],
        "direct_s": medians[1],
        "ratio": medians[0] / medians[1],
        "ratio_of_fastest": min(seconds[0]) / min(seconds[1]),
        "median_of_ratios": statistics.median(pairs),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--keep-units", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--prefill-tokens", type=int, default=256)
    parser.add_argument("--quantized-prefill-tokens", type=int, default=8)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    shape = find_shape(options.shape, options.keep_units)
    config = {**shape.config, "num_hidden_layers": options.layers, "vocab_size": 4096}
    direct_config = dataclasses.replace(shape, config=config).compact_config()
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    dense = build_model(config, dtype)
    selection = select_random(dense, options.keep_units)
    rows: dict[str, dict[str, float]] = {}
    print(f"{'':28} {'compact ms':>11} {'direct ms':>11} {'ratio':>7} {'fastest':>8} {'pairs':>7}")
    for bits in (16, 4):
        compact = slice_model(dense, selection)
        if bits != 16:
            nn.quantize(compact, group_size=GROUP_SIZE, bits=bits)
        mx.eval(compact.parameters())
        direct = build_model(direct_config, dtype, bits)
        tokens = options.prefill_tokens if bits == 16 else options.quantized_prefill_tokens
        kind = "plain" if bits == 16 else f"{bits} bits"
        works = {
            f"decode, {kind}": (make_decoder(compact), make_decoder(direct)),
            f"prefill {tokens} tokens, {kind}": (
                make_prefill(compact, tokens),
                make_prefill(direct, tokens),
            ),
        }
        for name, (ours, theirs) in works.items():
            row = compare(ours, theirs, options.repeats, options.cpu_time)
            rows[name] = row
            print(
                f"{name:28} {row['compact_s'] * 1e3:11.2f} {row['direct_s'] * 1e3:11.2f} "
                f"{row['ratio']:7.3f} {row['ratio_of_fastest']:8.3f} "
                f"{row['median_of_ratios']:7.3f}",
                flush=True,
            )
    print(json.dumps({**machine(), "blas": BLAS, **vars(options), "rows": rows}))


if __name__ == "__main__":
    main()
