"""Measure the forms in which a sub-network can hold a packed down projection.

    python benchmarks/down_forms.py [--repeats 9]

The kept columns as plain weights, the packed projection kept whole (both exact), the columns
quantized again at 8 bits, and, only for its speed, 4 bits with groups along the outputs and
``transpose=False``: no checkpoint has its scales so, and to make them rounds again. Milliseconds of
one product, medians, and megabytes; 4 bits in groups of 64. Ends with one JSON line.
"""

import argparse
import functools
import json

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from ifp_mlx.benchmarking.timing import Repeats, Timing, machine, measure_in_turns  # noqa: E402
from ifp_mlx.selection.top_k import top_k_indices  # noqa: E402
from ifp_mlx.slicing.whole_down import WholeDown  # noqa: E402
from ifp_mlx.units.modules import plain_linear, stored_bytes  # noqa: E402

SHAPES = ((576, 1536), (2048, 8192))  # D, F: of SmolLM2-135M and of the checkpoint in memory.py
KEEP = (2 / 3, 1 / 2, 1 / 4)
TOKENS = (1, 64)
BITS, GROUP_SIZE = 4, 64


class UnitRows(nn.Module):
    """The columns packed as rows of their units, in groups along the outputs."""

    def __init__(self, columns: mx.array):
        super().__init__()
        self.weight, self.scales, self.biases = mx.quantize(
            mx.contiguous(columns.T), GROUP_SIZE, BITS
        )

    def __call__(self, activations: mx.array) -> mx.array:
        """Map (T, K) activations to (T, D)."""
        return mx.quantized_matmul(
            activations, self.weight, self.scales, self.biases,
            transpose=False, group_size=GROUP_SIZE, bits=BITS,
        )  # fmt: skip


def down_forms(hidden_size: int, num_units: int, num_kept: int) -> dict[str, nn.Module]:
    """Return the forms by name, evaluated."""
    weight = 0.02 * mx.random.normal((hidden_size, num_units), key=mx.random.key(0))
    packed = nn.QuantizedLinear.from_linear(plain_linear(weight), GROUP_SIZE, BITS)
    scores = mx.random.uniform(shape=(1, num_units), key=mx.random.key(1))
    units = top_k_indices(scores, num_kept)[0]
    plain = plain_linear(mx.contiguous(mx.take(weight, units, axis=1)))
    forms = {
        "plain": plain,
        "whole": WholeDown(packed, units),
        "8 bits": nn.QuantizedLinear.from_linear(plain, GROUP_SIZE, 8),
        "by unit": UnitRows(plain.weight),
    }
    for form in forms.values():
        mx.eval(form.parameters())
    return forms


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    rows = []
    print(f"{'D':>5} {'F':>5} {'K':>5}  {'':8} {'MB':>7} {'1 token':>9} {'64 tokens':>10}")
    for hidden_size, num_units in SHAPES:
        for keep in KEEP:
            num_kept = round(keep * num_units / 64) * 64
            forms = down_forms(hidden_size, num_units, num_kept)
            timings = [time_forms(forms, tokens, num_kept, options.repeats) for tokens in TOKENS]
            for name, form in forms.items():
                megabytes = stored_bytes(form) / 1e6
                one, many = (1000 * timing[name].median_s for timing in timings)
                print(
                    f"{hidden_size:5} {num_units:5} {num_kept:5}  {name:8} {megabytes:7.2f} "
                    f"{one:9.2f} {many:10.2f}",
                    flush=True,
                )
                rows.append([hidden_size, num_units, num_kept, name, megabytes, one, many])
    print(json.dumps({**machine(), "rows": rows}))


def time_forms(
    forms: dict[str, nn.Module], num_tokens: int, num_kept: int, repeats: int
) -> dict[str, Timing]:
    """Return the time of each form's product with the activations of some tokens."""
    activations = mx.random.normal((num_tokens, num_kept), key=mx.random.key(2))
    mx.eval(activations)
    works = {name: functools.partial(form, activations) for name, form in forms.items()}
    return measure_in_turns(works, Repeats(repeats))


if __name__ == "__main__":
    main()
