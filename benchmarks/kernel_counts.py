"""Count what a time to the first token launches: primitives of each stage's graph, layers as in 8B.

    python benchmarks/kernel_counts.py

Counts the graphs that mlx builds for the Llama-3.1-8B shape and a Qwen2.5-0.5B-shaped predictor,
narrow, because the width changes no count. Norm, rotation and attention count as one kernel each,
which they are on an accelerator; views launch nothing. Looking at results on the host is not
counted. Also the time that building takes there, without evaluating: this machine's, not an
accelerator host's. Ends with one JSON line.
"""

import collections
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ifp_mlx.benchmarking import shapes
from ifp_mlx.benchmarking.timing import machine
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.selection.top_k import top_k_indices
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.units.modules import unit_arrays, unit_shape

VIEWS = {
    "Broadcast",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unflatten",
    "View",
}
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
PROMPT = list(range(512))  # one piece of a prefill
NUM_KEPT_UNITS = 64
REPEATS = 50


def count(arrays: Sequence[mx.array]) -> collections.Counter[str]:
    """Return how often each primitive that launches something is in the graph of some arrays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *arrays)
        names = re.findall(r'label ="([A-Za-z]+)', path.read_text(encoding="utf-8"))
    return collections.Counter(name for name in names if name not in VIEWS)


def use_stand_ins() -> None:
    """Put one primitive in place of each fused kernel, which a CPU's graph has in parts."""
    fused: Any = mx.fast
    fused.rms_norm = lambda hidden, *_: mx.abs(hidden)
    fused.layer_norm = lambda hidden, *_: mx.abs(hidden)
    fused.rope = lambda heads, *_, **__: mx.sinh(heads)
    fused.scaled_dot_product_attention = attend


def attend(queries: mx.array, keys: mx.array, values: mx.array, **_: Any) -> mx.array:
    """Return a stand-in that depends on all three."""
    column = mx.broadcast_to(keys[:1, :1, :1, :1], (*queries.shape[:-1], 1))
    row = mx.broadcast_to(values[:1, :1, :1, :1], (*queries.shape[:2], 1, queries.shape[-1]))
    return mx.addmm(queries, column, row)


def host_ms(build: Callable[[], Any]) -> float:
    """Return the least time that building a graph takes, in milliseconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        build()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    """Print a line for each stage."""
    use_stand_ins()
    dense = shapes.build_model({**shapes.SHAPES["llama-3.1-8b"].config, **NARROW}, mx.bfloat16)
    reader = {**shapes.PREDICTORS["qwen2.5-0.5b"], **NARROW}
    predictor = shapes.build_predictor(reader, unit_shape(dense), mx.bfloat16)
    selection = select_random(dense, NUM_KEPT_UNITS)
    compact = slice_model(dense, selection)
    mx.eval(compact.parameters())
    ids = mx.array([PROMPT])
    stages: dict[str, Callable[[], Sequence[mx.array]]] = {
        "selection": lambda: [top_k_indices(predictor.scores_of([PROMPT])[0], NUM_KEPT_UNITS)],
        "slicing": lambda: list(unit_arrays(slice_model(dense, selection)).values()),
        "prefill": lambda: [compact(ids, cache=make_prompt_cache(compact))[:, -1]],
    }
    rows = {}
    for name, build in stages.items():
        counts = count(build())
        most = ", ".join(f"{number} {primitive}" for primitive, number in counts.most_common(8))
        print(f"{name}: {counts.total()} launches, {host_ms(build):.1f} ms to build ({most})")
        rows[name] = {"launches": counts.total(), "primitives": dict(counts.most_common())}
    print(json.dumps({**machine(), "rows": rows}))


if __name__ == "__main__":
    main()
