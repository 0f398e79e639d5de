"""How fast units are gathered from a model in memory, against a device copy of the same bytes."""

import dataclasses
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.benchmarking.timing import COPIES, Repeats, Timing, copy_works, measure_in_turns
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import DEFAULT_CUT, CutOptions, rows_of, slice_model
from ifp_mlx.units.modules import (
    compute_dtype,
    dequantized,
    family_of,
    packed_leaves,
    part_arrays,
    part_of,
    unit_arrays,
    unit_layers,
)

Gather = Callable[[], list[mx.array]]

SLICED = "as ifp slices"
SLICED_EXACTLY = "as ifp slices, down exact"
TAKEN = "mx.take for each array"


@dataclasses.dataclass(frozen=True)
class SlicingRow:
    """One way to gather all layers of a sub-network.

    Attributes:
        name: which way.
        timing: all layers, one evaluation.
        num_bytes: what it writes.
        copy_s: a device copy of the same arrays.
        ratio: to that copy.
    """

    name: str
    timing: Timing
    num_bytes: int
    copy_s: float
    ratio: float


def measure_slicing(
    model: nn.Module, selection: Selection, *, repeats: Repeats
) -> list[SlicingRow]:
    """Return the time of each way to gather the units of all layers. Evaluates.

    Args:
        model: the source.
        selection: K of its units.
        repeats: how often.
    """
    rows: list[SlicingRow] = []
    for name, gather in gathers(model, selection).items():
        mx.clear_cache()
        outputs = gather()
        mx.eval(outputs)
        words = [_words(array) for array in outputs]
        mx.eval(words)
        del outputs
        timings = measure_in_turns({"gather": gather, **copy_works(words)}, repeats)
        copy_s = min(timings[kind].median_s for kind in COPIES)
        rows.append(
            SlicingRow(
                name=name,
                timing=timings["gather"],
                num_bytes=sum(array.nbytes for array in words),
                copy_s=copy_s,
                ratio=timings["gather"].median_s / copy_s,
            )
        )
        del words
    return rows


def gathers(model: nn.Module, selection: Selection) -> dict[str, Gather]:
    """Return ways to gather a selection; each returns the arrays that it writes, lazy.

    The product's own, which checks the selection first, beside ``mx.take`` alone. Of packed
    columns ``mx.take`` gives plain ones, the product ones of 8 bits unless they are to be exact.
    """
    ways = {SLICED: _sliced(model, selection, DEFAULT_CUT)}
    if packed_leaves(model):
        ways[SLICED_EXACTLY] = _sliced(model, selection, CutOptions(exact_down=True))
    return ways | {TAKEN: lambda: _taken(model, selection)}


def _sliced(model: nn.Module, selection: Selection, options: CutOptions) -> Gather:
    # A down projection that stays whole is the source's own: nothing is written.
    shared = {id(array) for array in unit_arrays(model).values()}

    def gather() -> list[mx.array]:
        compact = slice_model(model, selection, options)
        return [array for array in unit_arrays(compact).values() if id(array) not in shared]

    return gather


def _taken(model: nn.Module, selection: Selection) -> list[mx.array]:
    arrays = []
    pick, dtype = selection.pick, compute_dtype(model)
    for position, layer in enumerate(unit_layers(model).values()):
        units = pick.units(position)
        for part in family_of(model).kind.parts:
            if part.axis == -1:
                down = dequantized(part_of(layer, part), dtype)
                arrays.append(mx.take(down, units, axis=1))
                continue
            rows = rows_of(part, units, pick.num_units)
            arrays += [mx.take(a, rows, axis=0) for a in part_arrays(layer, part).values()]
    return arrays


def _words(array: mx.array) -> mx.array:
    """Return an array's bytes as one row of 32-bit words, for copying."""
    whole = mx.contiguous(array)
    if whole.shape[-1] * whole.dtype.size % mx.uint32.size:
        return whole.reshape(-1).view(mx.uint32)
    # Words first: mlx counts the elements of an axis in 32 bits, and a large array has more.
    return whole.view(mx.uint32).reshape(-1)
