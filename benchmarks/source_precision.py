"""Measure what sub-networks of a packed model with an adapter take, and what packing again costs.

    python benchmarks/source_precision.py MODEL --data DATA/eval -o FILE.json

Three tasks are cached and one of them exported, all in a temporary folder; sizes are those of the
files. Cross-entropy on held-out text is that of the exported task's units, as training left them,
in float32, before anything is packed, then packed as the product does it, then at the bits of
``--bits`` in groups of 64, all on the same examples; differences are paired, with standard errors
over examples.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ifp_mlx.blas import prefer_openblas

BLAS = prefer_openblas()  # before mlx is imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402

from ifp_mlx.assistant import Assistant  # noqa: E402
from ifp_mlx.benchmarking.timing import machine  # noqa: E402
from ifp_mlx.convert.export import export_checkpoint  # noqa: E402
from ifp_mlx.convert.model_card import ModelCard  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402
from ifp_mlx.evaluation.quality import HeldOutExample, evaluate, load_held_out  # noqa: E402
from ifp_mlx.selection.selection import Selection  # noqa: E402
from ifp_mlx.slicing.compact import CutOptions, slice_model  # noqa: E402
from ifp_mlx.slicing.forms import as_computed  # noqa: E402
from ifp_mlx.slicing.repacking import (  # noqa: E402
    Repacking,
    RequantizationError,
    with_changes_packed,
)
from ifp_mlx.storage.weights import automatic_dtype, load_model, stored_tensors  # noqa: E402
from ifp_mlx.subnets.task_cache import TaskCache  # noqa: E402
from ifp_mlx.units.modules import unit_arrays  # noqa: E402

TASKS = ("help me write Python", "solve maths problems", "write SQL queries")
GROUP_SIZE = 64


def folder_bytes(folder: Path) -> int:
    """Return what the files below a folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def weights_bytes(path: Path) -> int:
    """Return what the tensors of a checkpoint take."""
    return sum(tensor.num_bytes for tensor in stored_tensors(path).values())


def measure_sizes(path: Path, work: Path) -> tuple[dict[str, Any], Selection]:
    """Return what the export and the cache take, and the units of the exported task."""
    cache = TaskCache(work / "cache")
    assistant = Assistant.load(path, cache=cache, options=CutOptions(as_stored=True))
    kept = assistant.default_num_kept_units
    subnets = [assistant.subnetwork_for_task(task, kept) for task in TASKS]
    first = subnets[0]
    assert first.selection is not None
    card = ModelCard(
        None, None, TASKS[0], str(first.selector), kept, first.num_units,
        len(first.selection.pick.layers), first.kind.label, first.size.parameters,
        first.source.parameters,
    )  # fmt: skip
    made = export_checkpoint(first.model, first.selection, path, work / "export", card)
    source = load_model(path, lazy=True)[0]
    source_units = sum(array.nbytes for array in unit_arrays(source).values())
    return {
        "keep_units": kept,
        "num_units": first.num_units,
        "source_bytes": weights_bytes(path),
        "export_bytes": made.num_bytes,
        "three_tasks_bytes": folder_bytes(cache.folder),
        "three_tasks_limit_bytes": weights_bytes(path)
        + len(TASKS) * source_units * kept // first.num_units,
        "packed_again_error": first.requantization_error,
    }, first.selection


def losses(model: nn.Module, examples: Sequence[HeldOutExample]) -> np.ndarray[Any, Any]:
    """Return (nats, tokens) of each example."""
    rows = []
    for example in examples:
        (quality,) = evaluate(model, [example], lambda batch: None).values()
        rows.append((quality.cross_entropy * quality.num_tokens, quality.num_tokens))
    return np.array(rows)


def row(found: np.ndarray[Any, Any], before: np.ndarray[Any, Any], domains: list[str]) -> Any:
    """Return mean cross-entropy over domains, and the paired difference from another row."""
    names = sorted(set(domains))
    which = np.array(domains)

    def mean(rows: np.ndarray[Any, Any]) -> float:
        sums = [rows[which == name].sum(axis=0) for name in names]
        return float(np.mean([total / count for total, count in sums]))

    difference = (found[:, 0] - before[:, 0]) / before[:, 1]
    return {
        "cross_entropy": mean(found),
        "difference": mean(found) - mean(before),
        "difference_per_example": float(difference.mean()),
        "standard_error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
        "largest_domain_difference": max(
            (
                (found[which == name, 0].sum() - before[which == name, 0].sum())
                / before[which == name, 1].sum()
                for name in names
            ),
            key=abs,
        ),
    }


def main() -> None:
    """Measure and print, and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a model's name or folder")
    parser.add_argument("--data", type=Path, required=True, help="held-out text")
    parser.add_argument("--limit", type=int, default=20, help="examples of each domain")
    parser.add_argument("--bits", type=int, nargs="*", default=[], help="further rows")
    parser.add_argument("--output", "-o", type=Path, required=True)
    arguments = parser.parse_args()
    path = resolve_model(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        sizes, selection = measure_sizes(path, Path(folder))
        print(json.dumps(sizes), flush=True)
        exported = load_model(Path(folder) / "export")[0]
    assistant = Assistant.load(path)
    held_out = load_held_out(arguments.data, assistant.tokenizer, arguments.limit)
    examples = [example for domain in held_out.values() for example in domain]
    domains = [name for name, domain in held_out.items() for _ in domain]
    assert assistant.files.adapter is not None
    changed = assistant.files.adapter.apply(load_model(path, lazy=True)[0])
    exact = slice_model(changed, selection, CutOptions(exact_down=True))
    dtype = automatic_dtype(exact)
    before = losses(as_computed(exact, dtype), examples)
    rows: dict[str, Any] = {"before": row(before, before, domains)}
    forms: dict[str, nn.Module] = {"as the product packs": exported}
    for bits in arguments.bits:
        repacking, error = Repacking(bits, GROUP_SIZE), RequantizationError()
        packed = with_changes_packed(changed, repacking, error)
        forms[f"{bits} bits"] = slice_model(
            packed, selection, CutOptions(as_stored=True), error, repacking
        )
    for name, form in forms.items():
        model = as_computed(form, dtype)
        mx.eval(model.parameters())
        rows[name] = row(losses(model, examples), before, domains)
        print(name, json.dumps(rows[name]), flush=True)
    document = {
        "model": path.name,
        "tasks": TASKS,
        "limit": arguments.limit,
        "num_examples": len(examples),
        "machine": machine(),
        **sizes,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
