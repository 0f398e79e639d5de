"""Measure peak memory and bytes read: the dense model in mlx-lm, and sub-networks of it.

    python benchmarks/memory.py [CHECKPOINT] [--keep 0.25] [--max-tokens 2]

Without a checkpoint it writes a synthetic one of 2.9 GB in a temporary folder and removes it.
Each row is a fresh process; ours calls what ``ifp generate`` calls, allowed as much memory as is
predicted, so that the dense model is left on the disk. Reads are less what
the same program reads before it opens the model. Linux only. Ends with one JSON line.
"""

import argparse
import json
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
from fresh_process import measure
from synthetic_checkpoint import LLAMA, write_checkpoint

from ifp_mlx.slicing.unit_file import UNIT_FILE, write_unit_file
from ifp_mlx.storage.weights import automatic_dtype, load_model
from ifp_mlx.subnets import memory

PROMPT = "Explain in a few words why the sky is blue."
LIMIT_FACTOR, LIMIT_EXTRA_BYTES = 1.15, 300 * 10**6

_DENSE = """
from mlx_lm import generate, load
before = read_bytes()
model, tokenizer = load(sys.argv[1])
if sys.argv[4] == "float32":
    import mlx.core as mx
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
generate(model, tokenizer, sys.argv[2], max_tokens=int(sys.argv[3]))
report(before)
"""

_IMPORTS = """
from pathlib import Path
import mlx_lm.generate
from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.sampling import SamplingOptions
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import CutOptions
"""

_OURS = (
    _IMPORTS
    + """
path, prompt, (max_tokens, kept, context, limit) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:7])
before = read_bytes()
assistant = Assistant.load(
    Path(path),
    selector=SelectorSpec(sys.argv[7]),
    options=CutOptions(context_tokens=context, memory_bytes=limit),
)
subnet = assistant.subnetwork_for_prompt(prompt, kept)
for _ in assistant.converse(subnet).complete(prompt, SamplingOptions(max_new_tokens=max_tokens)):
    pass
report(before)
"""
)

_NOTHING = f"{_IMPORTS}report(0)\n"


def measure_all(path: Path, keep: float, max_tokens: int) -> dict[str, Any]:
    """Return every row of the table for one checkpoint; its unit file is made anew."""
    stored, _ = load_model(path, lazy=True)
    dtype = automatic_dtype(stored)
    sizes = memory.checkpoint_sizes(path, dtype)
    kept = sizes.amounts.nearest(keep)
    context = len(PROMPT) + max_tokens  # at most a token a byte
    compact_bytes = sizes.predict(kept, context).weights_bytes
    kept_bytes = compact_bytes // (1 if dtype is None else sizes.item_bytes // 2)
    common = (str(path), PROMPT, str(max_tokens))
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, figures: tuple[int, int], predicted: int | None) -> None:
        rows[name] = {
            "peak_bytes": figures[0],
            "read_bytes": figures[1],
            "predicted_bytes": predicted,
        }
        shown = "" if predicted is None else f"{predicted / 1e9:.3f}"
        print(f"{name:44} {figures[0] / 1e9:9.3f} {shown:>10} {figures[1] / 1e9:9.3f}", flush=True)

    print(f"{'GB':44} {'peak':>9} {'predicted':>10} {'read':>9}")
    add("program alone", measure(_NOTHING), None)
    dense_dtype = "float32" if dtype == mx.float32 else "stored"
    add("mlx-lm, dense", measure(_DENSE, *common, dense_dtype), None)
    for has_unit_file in (False, True):
        (path / UNIT_FILE).unlink(missing_ok=True)
        if has_unit_file:
            write_unit_file(path)
        how = "with unit file" if has_unit_file else "without unit file"
        predicted = memory.predict_peak_bytes(path, kept, context, dtype).total_bytes
        amounts = [str(amount) for amount in (kept, context, predicted)]
        for selector in ("random", "prompt"):
            figures = measure(_OURS, *common, *amounts, selector)
            add(f"ifp, {selector} selector, {how}", figures, predicted)
    limit = int(LIMIT_FACTOR * compact_bytes) + LIMIT_EXTRA_BYTES
    print(f"compact weights {compact_bytes / 1e9:.3f} GB, limit of the peak {limit / 1e9:.3f} GB")
    print(f"kept bytes as stored {kept_bytes / 1e9:.3f} GB")
    return {
        "num_kept_units": kept,
        "num_units": sizes.amounts.num_units,
        "compute": "as stored" if dtype is None else str(dtype),
        "compact_bytes": compact_bytes,
        "kept_stored_bytes": kept_bytes,
        "peak_limit_bytes": limit,
        "rows": rows,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--max-tokens", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ifp-memory-") as folder:
        path = options.checkpoint
        if path is None:
            path = Path(folder) / "synthetic"
            write_checkpoint(path, LLAMA)
        figures = measure_all(path, options.keep, options.max_tokens)
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "memory_bytes": memory.usable_memory_bytes(),
        "system": platform.platform(terse=True),
        "mlx": metadata.version("mlx"),
    }
    print(json.dumps({**machine, **figures}))


if __name__ == "__main__":
    main()
