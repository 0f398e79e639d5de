"""Measure half of a mixture: peak memory, bytes read, selecting, switching; beside mlx-lm.

    python benchmarks/experts.py [CHECKPOINT] [--keep 0.5] [--out FILE]

Without a checkpoint it writes one of 3.3 GB in a temporary folder: eight layers of 128 experts in
Qwen3-30B-A3B's layout, half as wide, in float32, the one type that mlx computes fast on a CPU. Each
row is a fresh process; ours calls what ``ifp generate`` and ``ifp cache add``
call. Selecting reads eight examples. Switching goes from one set of experts to one that shares 80 %
of them, both read from the disk. Linux only.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from fresh_process import measure
from synthetic_checkpoint import write_checkpoint

from ifp_mlx.benchmarking.report import write_document
from ifp_mlx.benchmarking.shapes import find_shape
from ifp_mlx.benchmarking.timing import machine
from ifp_mlx.storage.weights import automatic_dtype, load_model
from ifp_mlx.subnets import memory
from ifp_mlx.units.modules import stored_bytes, unit_layers

_SIZES = {
    "num_hidden_layers": 8,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "moe_intermediate_size": 256,
}
SHARED = 0.8
PROMPT = "Explain in a few words why the sky is blue."
EXAMPLES = [f"{PROMPT} Say it to somebody who is {age} years old." for age in range(4, 12)]

_WHOLE = """
from mlx_lm import generate, load
before = read_bytes()
model, tokenizer = load(sys.argv[1])
generate(model, tokenizer, sys.argv[2], max_tokens=2)
report(before)
"""

_OURS = """
import json, time
from pathlib import Path
import mlx.core as mx
import mlx_lm.generate
from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.sampling import SamplingOptions
from ifp_mlx.selection.selection import Pick, Selection
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import CutOptions

def load(limit, selector):
    options = CutOptions(context_tokens=64, memory_bytes=int(limit))
    return Assistant.load(Path(sys.argv[1]), selector=SelectorSpec(selector), options=options)

def selection(rows, num_experts, layers):
    indices = mx.array([rows] * len(layers), dtype=mx.int32)
    pick = Pick("expert", tuple(layers), indices, num_experts)
    return Selection((pick,), SelectorSpec("given"))
"""

_ANSWER = (
    _OURS
    + """
before = read_bytes()
assistant = load(sys.argv[4], "random")
subnet = assistant.subnetwork_for_prompt(sys.argv[2], int(sys.argv[3]))
for _ in assistant.converse(subnet).complete(sys.argv[2], SamplingOptions(max_new_tokens=2)):
    pass
report(before)
"""
)

_SELECT = (
    _OURS
    + """
before = read_bytes()
assistant = load(sys.argv[4], "prompt")
assistant.select_for(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[5]))
report(before)
"""
)

_SWITCH = (
    _OURS
    + """
assistant = load(sys.argv[4], "random")
first, second, num_experts, layers = json.loads(sys.argv[5])
def timed(rows):
    before, start = read_bytes(), time.perf_counter()
    assistant.subnetwork_of(selection(rows, num_experts, layers))
    return time.perf_counter() - start, read_bytes() - before
figures = timed(first), timed(second)
Path(sys.argv[6]).write_text(json.dumps(figures))
report(0)
"""
)

_OPENED = (
    _OURS
    + """
before = read_bytes()
assistant = load(sys.argv[4], "random")
assistant.skeleton, assistant.tokenizer
report(before)
"""
)


def measure_all(path: Path, keep: float) -> dict[str, Any]:
    """Return every row for one checkpoint."""
    stored, _ = load_model(path, lazy=True)
    dtype = automatic_dtype(stored)
    sizes = memory.checkpoint_sizes(path, dtype)
    amounts = sizes.amounts
    kept = amounts.nearest(keep)
    prediction = sizes.predict(kept, 64)
    common = (str(path), PROMPT, str(kept), str(prediction.total_bytes))
    rows: dict[str, tuple[int, int]] = {}

    def add(name: str, program: str, *more: str) -> None:
        rows[name] = measure(program, *common, *more)
        peak, read = rows[name]
        print(f"{name:36} {peak / 1e9:9.3f} {read / 1e9:9.3f}", flush=True)

    print(f"{'GB':36} {'peak':>9} {'read':>9}")
    add("ifp, checkpoint opened", _OPENED)
    add("mlx-lm, whole", _WHOLE)
    add(f"ifp, {kept} of {amounts.num_units} experts", _ANSWER)
    add("ifp, selecting with eight examples", _SELECT, json.dumps(EXAMPLES))
    layers = list(unit_layers(stored))
    first = list(range(kept))
    moved = round((1 - SHARED) * kept)
    second = sorted(first[moved:] + list(range(kept, kept + moved)))
    with tempfile.NamedTemporaryFile(suffix=".json") as figures:
        add(
            "ifp, switching",
            _SWITCH,
            json.dumps([first, second, amounts.num_units, layers]),
            figures.name,
        )
        loading, switching = json.loads(Path(figures.name).read_text())
    print(
        f"loading {loading[0]:.2f} s, {loading[1] / 1e9:.3f} GB; switching to experts of which "
        f"{1 - moved / kept:.0%} are the same {switching[0]:.2f} s, {switching[1] / 1e9:.3f} GB"
    )
    opened = rows["ifp, checkpoint opened"]
    kept_bytes = prediction.weights_bytes
    layer_bytes = max(stored_bytes(layer) for layer in stored.layers)
    answer, select = (rows[name] for name in list(rows)[2:4])
    return {
        "machine": machine(),
        "checkpoint_bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
        "num_experts": amounts.num_units,
        "num_kept_experts": kept,
        "kept_bytes": kept_bytes,
        "layer_bytes": layer_bytes,
        "predicted_peak_bytes": prediction.total_bytes,
        "rows": {name: dict(zip(("peak", "read"), row, strict=True)) for name, row in rows.items()},
        "loading": dict(zip(("seconds", "read"), loading, strict=True)),
        "switching": dict(zip(("seconds", "read"), switching, strict=True)),
        "peak_above_opened_to_kept_and_layer": (answer[0] - opened[0]) / (kept_bytes + layer_bytes),
        "read_to_kept": answer[1] / kept_bytes,
        "selecting_peak_above_opened_to_layer": (select[0] - opened[0]) / layer_bytes,
        "selecting_read_to_checkpoint": select[1] / sizes.dense_bytes,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ifp-experts-") as folder:
        path = options.checkpoint
        if path is None:
            path = Path(folder) / "synthetic"
            config = {**find_shape("qwen3-30b-a3b").config, **_SIZES}
            write_checkpoint(path, config, dtype=mx.float32)
        figures = measure_all(path, options.keep)
    for name, value in figures.items():
        if "_to_" in name:
            print(f"{name}: {value:.3f}")
    if options.out is not None:
        write_document(options.out, figures)


if __name__ == "__main__":
    main()
