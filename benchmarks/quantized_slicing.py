"""Measure what slicing a quantized checkpoint costs: exact columns, and columns at 8 bits.

    python benchmarks/quantized_slicing.py CHECKPOINT [--keep-units 1024]

Each quantization is made from the checkpoint's weights; the prompt selects. The compact model is
compared with the whole quantized model whose other units are masked, both computed in float32: the
output of each layer's FFN for the same input (the worst layer), and the logits, where rounding has
gone through all layers. Relative Frobenius norms. Ends with one JSON line.
"""

import argparse
import json
from pathlib import Path

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from ifp_mlx import checkpoint, ffn  # noqa: E402
from ifp_mlx.benchmarking.timing import machine  # noqa: E402
from ifp_mlx.selection import PromptSelector, select  # noqa: E402
from ifp_mlx.subnetwork import RequantizationError, slice_model  # noqa: E402

GROUP_SIZE = 32
QUANTIZATIONS = {"4 bits": ("affine", 4), "8 bits": ("affine", 8), "mxfp4": ("mxfp4", 4)}


def relative(found: mx.array, expected: mx.array) -> float:
    """Return the relative Frobenius norm of a difference."""
    ratio = mx.linalg.norm(found - expected) / mx.linalg.norm(expected)
    return float(ratio.item())  # type: ignore[arg-type]


def worst_ffn(compact: nn.Module, masked: nn.Module) -> float:
    """Return the largest relative difference of two models' FFN outputs, over the layers."""
    pairs = zip(ffn.ffn_modules(compact), ffn.ffn_modules(masked), strict=True)
    inputs = mx.random.normal((1, 8, compact.args.hidden_size), key=mx.random.key(0))
    return max(relative(ours(inputs), theirs(inputs)) for ours, theirs in pairs)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--keep-units", type=int, default=1024)
    options = parser.parse_args()
    token_ids = [1, 504, 3575, 6354, 253, 2232, 282, 28]  # any words
    tokens = mx.array([token_ids])
    rows: dict[str, dict[str, float]] = {}
    print(
        f"{'':8} {'FFN, exact':>11} {'logits, exact':>14} {'columns, 8-bit down':>20} "
        f"{'logits, 8-bit down':>19}"
    )
    for name, (mode, bits) in QUANTIZATIONS.items():
        model, _ = checkpoint.load_model(options.checkpoint, mx.float32)
        nn.quantize(model, group_size=GROUP_SIZE, bits=bits, mode=mode)
        selection = select(PromptSelector(model), token_ids, options.keep_units)
        masked = ffn.with_unit_masks(model)
        ffn.set_unit_masks(masked, selection.mask())
        expected = masked(tokens)
        error = RequantizationError()
        requantized = slice_model(model, selection, error=error)
        exact = slice_model(model, selection, exact_down=True)
        rows[name] = {
            "exact_ffn": worst_ffn(exact, masked),
            "exact": relative(exact(tokens), expected),
            "requantized": relative(requantized(tokens), expected),
            "columns": error.relative,
        }
        row = rows[name]
        print(
            f"{name:8} {row['exact_ffn']:11.1e} {row['exact']:14.1e} {row['columns']:20.1e} "
            f"{row['requantized']:19.1e}",
            flush=True,
        )
    print(
        json.dumps(
            {
                **machine(),
                "checkpoint": options.checkpoint.name,
                "keep_units": options.keep_units,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
