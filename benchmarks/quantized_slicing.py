"""Check what slicing a quantized checkpoint costs: nothing where it is exact, and what it says.

    python benchmarks/quantized_slicing.py CHECKPOINT [--keep-units 1024] [--random 3]

For a Llama checkpoint in float32. Each quantization is what ``ifp quantize`` writes, with the side
file of ``ifp prepare``; the units are those that a prompt selects, then random ones. Columns that
are read through the side file must be those of the checkpoint bit for bit. All differences are
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
from ifp_mlx.selection.selection import PromptSelector, RandomSelector, Selection, select  # noqa: E402
from ifp_mlx.slicing.compact import slice_model, with_cut_downs  # noqa: E402
from ifp_mlx.slicing.streaming import LoadedSubnetwork, load_subnetwork  # noqa: E402
from ifp_mlx.slicing.unit_file import write_side_file  # noqa: E402
from ifp_mlx.storage import checkpoint  # noqa: E402
from ifp_mlx.units import ffn  # noqa: E402

QUANTIZATIONS = {
    "4 bits": make_quantization(bits=4, group_size=32),
    "8 bits": make_quantization(bits=8, group_size=32),
    "mxfp4": make_quantization(mode="mxfp4"),
}
TOKEN_IDS = [1, 504, 3575, 6354, 253, 2232, 282, 28]  # any words
PARTS = ("weight", "scales", "biases")


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative Frobenius norm of a difference."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def wide(array: mx.array) -> np.ndarray:
    """Return an array in float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def worst_ffn(compact: nn.Module, masked: nn.Module) -> float:
    """Return the largest relative difference of two models' FFN outputs, over the layers."""
    pairs = zip(ffn.ffn_modules(compact), ffn.ffn_modules(masked), strict=True)
    inputs = mx.random.normal((1, 8, compact.args.hidden_size), key=mx.random.key(0))
    return max(relative(wide(ours(inputs)), wide(theirs(inputs))) for ours, theirs in pairs)


def recomputed_error(path: Path, compact: nn.Module, selection: Selection) -> float:
    """Return the error of a compact model's down projections against the checkpoint's arrays."""
    stored, _ = checkpoint.load_model(path)
    squares = np.zeros(2)
    for layer, units in enumerate(np.array(selection.indices)):
        columns = float64_llama.weight(stored.layers[layer].mlp.down_proj)[:, units]
        actual = float64_llama.weight(compact.layers[layer].mlp.down_proj)
        squares += ((actual - columns) ** 2).sum(), (columns**2).sum()
    return float(np.sqrt(squares[0] / squares[1]))


def require_same_columns(loaded: LoadedSubnetwork, plain: nn.Module) -> None:
    """End the program unless columns read through the side file are the expected ones."""
    pairs = zip(loaded.model.layers, plain.layers, strict=True)
    same = all(
        bool(mx.array_equal(one.mlp.down_proj.weight, other.mlp.down_proj.weight))
        for one, other in pairs
    )
    if not (loaded.unit_major and same):
        raise SystemExit("columns from the side file differ")


def compare(path: Path, selection: Selection) -> dict[str, float]:
    """Return the differences for one quantized checkpoint and selection."""
    model, _ = checkpoint.load_model(path)
    masked = ffn.with_unit_masks(model)
    ffn.set_unit_masks(masked, selection.mask())
    exact = load_subnetwork(path, selection, exact_down=True)
    requantized = load_subnetwork(path, selection)
    plain = with_cut_downs(exact.model)
    require_same_columns(load_subnetwork(path, selection, dtype=mx.float32), plain)
    tokens = mx.array([TOKEN_IDS])
    theirs, ours = wide(masked(tokens))[0], wide(exact.model(tokens))[0]
    plain_logits = wide(plain(tokens))[0]
    truth = float64_llama.masked_logits(model, TOKEN_IDS, wide(selection.mask()))
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
    card = ModelCard(None, None, None, "prompt", 1, 1, 1, 1, 1)
    compact = slice_model(plain, selection)
    export_checkpoint(compact, selection, source, target, card, quantization=quantization)
    exported, _ = checkpoint.load_model(target)
    equal = total = 0
    for layer, units in enumerate(np.array(selection.indices)):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = np.array(plain.layers[layer].mlp[name].weight)
            sliced = weight[:, units] if name == "down_proj" else weight[units]
            parts = mx.quantize(
                mx.array(sliced), quantization.group_size, quantization.bits, mode=quantization.mode
            )
            for part, expected in zip(PARTS, parts, strict=False):
                total += 1
                equal += bool(mx.array_equal(exported.layers[layer].mlp[name][part], expected))
    return equal, total


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--keep-units", type=int, default=1024)
    parser.add_argument("--random", type=int, default=3, help="how many random selections")
    options = parser.parse_args()
    plain, _ = checkpoint.load_model(options.checkpoint, mx.float32)
    shape = (len(plain.layers), ffn.num_units(plain))
    selections = {"prompt": select(PromptSelector(plain), TOKEN_IDS, options.keep_units)}
    for seed in range(options.random):
        selector = RandomSelector(*shape, seed=seed)
        selections[f"random {seed}"] = select(selector, TOKEN_IDS, options.keep_units)
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
            write_side_file(path)
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
