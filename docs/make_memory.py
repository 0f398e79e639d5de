"""Write the tables of docs/memory.md from stored results; ``--check`` only compares."""

import sys
from typing import Any
from unittest import mock

import make_fits
import mlx.core as mx
from page_tables import RESULTS, Table, as_table, read, run

from ifp_mlx.benchmarking.shapes import SHAPES
from ifp_mlx.subnets import memory
from ifp_mlx.subnets.fits import CONTEXT_TOKENS, skeleton
from ifp_mlx.units.model_config import ModelConfig

KEPT = (14336, 7168, 3584, 1536)


def gigabytes(count: int | None) -> str:
    """Return bytes in GB; nothing for None."""
    return "" if count is None else f"{count / 1e9:.3f}"


def predicted() -> str:
    """Return what is predicted for Llama 3.1 8B on a CPU, wherever this runs."""
    with mock.patch.object(memory.mx, "default_device", return_value=mx.cpu):
        return _predicted()


def _predicted() -> str:
    config = ModelConfig.parse(SHAPES["llama-3.1-8b"].config, "llama-3.1-8b")
    rows = []
    for label, packing in (("bfloat16", None), ("4 bits (group 64)", make_fits.FOUR_BITS)):
        model = skeleton(config, packing)
        assert model is not None
        sizes = memory.model_sizes(model, config)
        peaks = [sizes.predict(kept, CONTEXT_TOKENS).total_bytes / 1e9 for kept in KEPT]
        rows.append(
            (f"{label}, {sizes.dense_bytes / 1e9:.1f} GB", *(f"{peak:.1f}" for peak in peaks))
        )
    head = ("checkpoint", f"K = {KEPT[0]}", *(str(kept) for kept in KEPT[1:]))
    return as_table(head, rows)


def measured() -> str:
    """Return peaks and reads of fresh processes, from memory.py."""
    labels = {
        "the program without a model": "program alone",
        "mlx-lm, dense": "mlx-lm, dense",
        "`ifp generate`, random selector": "ifp, random selector, without unit file",
        "`ifp generate`, prompt selector": "ifp, prompt selector, without unit file",
        "`ifp generate`, random selector, side file": "ifp, random selector, with unit file",
        "`ifp generate`, prompt selector, side file": "ifp, prompt selector, with unit file",
    }
    stored = read(RESULTS / "memory.json")["rows"]
    rows = [
        (
            label,
            *(gigabytes(stored[key][f"{name}_bytes"]) for name in ("peak", "predicted", "read")),
        )
        for label, key in labels.items()
    ]
    return as_table(("", "peak", "predicted", "read"), rows)


def compact_speed() -> str:
    """Return the time of a compact model over that of a dense one of its shape."""
    stored = read(RESULTS / "compact-speed.json")
    labels = {
        "decode, float32": "decode, plain",
        "prefill, float32": f"prefill {stored['prefill_tokens']} tokens, plain",
        "decode, 4 bits": "decode, 4 bits",
        "prefill, 4 bits": f"prefill {stored['quantized_prefill_tokens']} tokens, 4 bits",
    }
    names = ("ratio", "median_of_ratios", "ratio_of_fastest")
    rows = [
        (label, *(f"{stored['rows'][key][name]:.3f}" for name in names))
        for label, key in labels.items()
    ]
    return as_table(("", "ratio of medians", "median of ratios", "ratio of fastest"), rows)


def source_precision() -> str:
    """Return what sub-networks of the packed default model take beside their source."""
    stored = read(RESULTS / "source-precision.json")
    source, limit = stored["source_bytes"], stored["three_tasks_limit_bytes"]
    rows = (
        ("source", f"{source:,}", ""),
        ("export of a task", f"{stored['export_bytes']:,}", f"{source:,}"),
        ("three cached tasks, with the source", f"{stored['three_tasks_bytes']:,}", f"{limit:,}"),
    )
    return as_table(("", "bytes", "limit"), rows, 1)


def scientific(values: list[float]) -> str:
    """Return one value, or the ends of several: 0, 5.7e-7, 6.0e-6 to 7.9e-6."""
    ends = [f"{value:.1e}".replace("e-0", "e-") for value in (min(values), max(values))]
    shown = ["0" if float(end) == 0 else end for end in ends]
    return shown[0] if shown[0] == shown[1] else " to ".join(shown)


def exactness() -> str:
    """Return how far sliced packed models are from masked ones."""
    keys = (
        "ffn_whole", "ffn_plain", "logits_whole", "logits_plain", "masked_to_truth",
        "plain_to_truth",
    )  # fmt: skip
    stored: list[dict[str, Any]] = read(RESULTS / "quantized-slicing.json")["rows"]
    rows = []
    for quantization in dict.fromkeys(row["quantization"] for row in stored):
        own = [row for row in stored if row["quantization"] == quantization]
        for units in ("prompt", "random"):
            some = [row for row in own if row["units"].startswith(units)]
            cells = [scientific([row[key] for row in some]) for key in keys]
            rows.append((quantization if units == "prompt" else "", units, *cells))
    head = (
        "", "units", "FFN: whole", "FFN: plain columns", "logits: whole", "logits: plain columns",
        "float64: masked model", "float64: plain columns",
    )  # fmt: skip
    return as_table(head, rows)


def down_forms() -> str:
    """Return megabytes and milliseconds of the forms of a packed down projection."""
    forms: dict[tuple[int, int, int], dict[str, list[float]]] = {}
    for *shape, name, megabytes, one, many in read(RESULTS / "down-forms.json")["rows"]:
        forms.setdefault((shape[0], shape[1], shape[2]), {})[name] = [megabytes, one, many]
    rows = [
        (
            ", ".join(map(str, shape)),
            *(f"{value:.2f}" for form in found.values() for value in form),
        )
        for shape, found in forms.items()
    ]
    heads = [f"{name}: MB" for name in ("plain", "whole", "8 bits", "by unit")]
    columns = [column for head in heads for column in (head, "1 token", "64 tokens")]
    return as_table(("D, F, K", *columns), rows)


TABLES: dict[str, Table] = {
    "predicted": predicted,
    "measured": measured,
    "compact speed": compact_speed,
    "source precision": source_precision,
    "exactness": exactness,
    "down forms": down_forms,
}

if __name__ == "__main__":
    sys.exit(run({"docs/memory.md": TABLES}))
