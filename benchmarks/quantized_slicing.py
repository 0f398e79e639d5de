"""Check what slicing a quantized checkpoint costs: nothing where it is exact, and what it says.

    python benchmarks/quantized_slicing.py CHECKPOINT [--keep-units 1024] [--random 3]

For a Llama checkpoint in float32. Each quantization is what ``ifp quantize`` writes, with the unit
file of ``--unit-major``; the units are those that a prompt selects, then random ones. Columns that
are read through the unit file must be those of the checkpoint bit for bit. All differences are
relative Frobenius norms, computed in float32 unless said otherwise:

* FFN: the output of each layer's FFN for the same input, exact sub-network against the whole
  quantized model with all other units masked; the worst layer. First as it is loaded, with packed
  down projections kept whole, then with the kept columns as plain weights.
* logits: the same at the end, where rounding has gone through all layers; then the masked model and
  the one with plain columns against the masked model in NumPy and float64.
* columns: the error that loading with down projections at 8 bits tells, and the same recomputed
  from the arrays of the checkpoint.
* once: of an export that is quantized, how many packed arrays of the FFNs equal the quantized
  NumPy slices of the plain weights bit for bit.

Ends with one JSON line.
"""

import argparse
import json
import tempfile
from pathlib import Path

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import float64_llama  # noqa: E402
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402

from ifp_mlx.benchmarking.timing import machine  # noqa: E402
from ifp_mlx.convert.export import export_checkpoint  # noqa: E402
from ifp_mlx.convert.model_card import ModelCard  # noqa: E402
from ifp_mlx.convert.quantize import (  # noqa: E402
    Quantization,
    make_quantization,
    quantize_checkpoint,
)
from ifp_mlx.selection.selection import Selection  # noqa: E402
from ifp_mlx.selection.selectors import select, select_random  # noqa: E402
from ifp_mlx.selection.spec import SelectorSpec  # noqa: E402
from ifp_mlx.slicing.compact import (  # noqa: E402
    CutModel,
    CutOptions,
    slice_model,
    with_cut_downs,
)
from ifp_mlx.slicing.streaming import load_subnetwork  # noqa: E402
from ifp_mlx.slicing.unit_file import write_unit_file  # noqa: E402
from ifp_mlx.storage.weights import load_model  # noqa: E402
from ifp_mlx.subnets.selectors import SelectorFiles, make_selector  # noqa: E402
from ifp_mlx.units.masks import down_part, downs, set_unit_masks, with_unit_masks  # noqa: E402
from ifp_mlx.units.modules import family_of, module_at, part_of, unit_layers  # noqa: E402

QUANTIZATIONS = {
    "4 bits": make_quantization(bits=4, group_size=32),
    "8 bits": make_quantization(bits=8, group_size=32),
    "mxfp4": make_quantization(mode="mxfp4"),
}
TOKEN_IDS = [1, 504, 3575, 6354, 253, 2232, 282, 28]  # any words
PACKED_ARRAYS = ("weight", "scales", "biases")


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative Frobenius norm of a difference."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def wide(array: mx.array) -> np.ndarray:
    """Return an array in float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def worst_ffn(compact: nn.Module, masked: nn.Module) -> float:
    """Return the largest relative difference of two models' FFN outputs, over the layers."""
    path = down_part(compact).path.rpartition(".")[0]
    pairs = zip(
        *([module_at(layer, path) for layer in model.layers] for model in (compact, masked)),
        strict=True,
    )
    inputs = mx.random.normal((1, 8, compact.args.hidden_size), key=mx.random.key(0))
    return max(relative(wide(ours(inputs)), wide(theirs(inputs))) for ours, theirs in pairs)


def recomputed_error(path: Path, compact: nn.Module, selection: Selection) -> float:
    """Return the error of a compact model's down projections against the checkpoint's arrays."""
    stored, _ = load_model(path)
    squares = np.zeros(2)
    every_units = np.array(selection.pick.indices)
    for whole, cut, units in zip(downs(stored), downs(compact), every_units, strict=True):
        columns, actual = float64_llama.weight(whole)[:, units], float64_llama.weight(cut)
        squares += ((actual - columns) ** 2).sum(), (columns**2).sum()
    return float(np.sqrt(squares[0] / squares[1]))


def require_same_columns(loaded: CutModel, plain: nn.Module) -> None:
    """End the program unless columns read through the unit file are the expected ones."""
    pairs = zip(downs(loaded.model), downs(plain), strict=True)
    same = all(bool(mx.array_equal(one.weight, other.weight)) for one, other in pairs)
    if not (loaded.used_unit_file and same):
        raise SystemExit("columns from the unit file differ")


def compare(path: Path, selection: Selection) -> dict[str, float]:
    """Return the differences for one quantized checkpoint and selection."""
    model, _ = load_model(path)
    masked = with_unit_masks(model)
    set_unit_masks(masked, selection.pick.mask())
    exact = load_subnetwork(path, selection, options=CutOptions(exact_down=True))
    requantized = load_subnetwork(path, selection)
    plain = with_cut_downs(exact.model)
    require_same_columns(load_subnetwork(path, selection, dtype=mx.float32), plain)
    tokens = mx.array([TOKEN_IDS])
    theirs, ours = wide(masked(tokens))[0], wide(exact.model(tokens))[0]
    plain_logits = wide(plain(tokens))[0]
    truth = float64_llama.masked_logits(model, TOKEN_IDS, wide(selection.pick.mask()))
    return {
        "ffn_whole": worst_ffn(exact.model, masked),
        "ffn_plain": worst_ffn(plain, masked),
        "logits_whole": relative(ours, theirs),
        "logits_plain": relative(plain_logits, theirs),
        "masked_to_truth": relative(theirs, truth),
        "plain_to_truth": relative(plain_logits, truth),
        "columns_told": requantized.requantization_error,
        "columns_recomputed": recomputed_error(path, requantized.model, selection),
        "requantized_logits": relative(wide(requantized.model(tokens))[0], theirs),
    }


def quantized_once(
    plain: nn.Module, source: Path, selection: Selection, quantization: Quantization, target: Path
) -> tuple[int, int]:
    """Return how many packed FFN arrays of an export are as they should be, and how many exist."""
    card = ModelCard(None, None, None, "prompt", 1, 1, 1, "FFN units", 1, 1)
    compact = slice_model(plain, selection)
    export_checkpoint(compact, selection, source, target, card, quantization=quantization)
    exported, _ = load_model(target)
    layers = zip(unit_layers(plain).values(), unit_layers(exported).values(), strict=True)
    equal = total = 0
    for (before, after), units in zip(layers, np.array(selection.pick.indices), strict=True):
        for part in family_of(plain).kind.parts:
            weight = np.array(part_of(before, part).weight)
            packed = mx.quantize(
                mx.array(weight.take(units, axis=part.axis)),
                quantization.group_size,
                quantization.bits,
                mode=quantization.mode,
            )
            for name, expected in zip(PACKED_ARRAYS, packed, strict=False):
                total += 1
                equal += bool(mx.array_equal(part_of(after, part)[name], expected))
    return equal, total


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--keep-units", type=int, default=1024)
    parser.add_argument("--random", type=int, default=3, help="how many random selections")
    options = parser.parse_args()
    plain, _ = load_model(options.checkpoint, mx.float32)
    by_prompt = make_selector(SelectorSpec("prompt"), plain, SelectorFiles())
    selections = {"prompt": select(by_prompt, TOKEN_IDS, options.keep_units)}
    for seed in range(options.random):
        selections[f"random {seed}"] = select_random(plain, options.keep_units, seed)
    rows: list[dict[str, object]] = []
    print(
        f"{'':8} {'units':9} {'FFN: whole':>10} {'plain':>8} {'logits: whole':>13} {'plain':>8} "
        f"{'masked-f64':>11} {'plain-f64':>9} "
        f"{'columns':>10} {'again':>10} {'logits, 8 bits':>14} {'once':>8}"
    )
    for name, quantization in QUANTIZATIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantized"
            quantize_checkpoint(options.checkpoint, path, quantization)
            write_unit_file(path)
            for units, selection in selections.items():
                equal, total = quantized_once(
                    plain, options.checkpoint, selection, quantization, Path(folder) / units
                )
                row = compare(path, selection)
                rows.append({"quantization": name, "units": units, **row})
                rows[-1] |= {"equal_arrays": equal, "arrays": total}
                print(
                    f"{name:8} {units:9} {row['ffn_whole']:10.1e} {row['ffn_plain']:8.1e} "
                    f"{row['logits_whole']:13.1e} {row['logits_plain']:8.1e} "
                    f"{row['masked_to_truth']:11.1e} {row['plain_to_truth']:9.1e} "
                    f"{row['columns_told']:10.4e} {row['columns_recomputed']:10.4e} "
                    f"{row['requantized_logits']:14.1e} {equal:4}/{total}",
                    flush=True,
                )
    summary = {**machine(), "checkpoint": options.checkpoint.name, "rows": rows}
    print(json.dumps({**summary, "keep_units": options.keep_units}))


if __name__ == "__main__":
    main()
