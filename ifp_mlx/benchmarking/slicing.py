"""How fast FFN units can be gathered, against a plain device copy of the same bytes.

Only the FFN weights of a shape are built, in two layouts: as checkpoints have them, where a unit
is a row of gate and up and a column of down; and *unit-major*, where down is stored transposed
and its units are rows too.
"""

import dataclasses
from collections.abc import Callable, Sequence

import mlx.core as mx

from ifp_mlx.benchmarking.shapes import QUANTIZATION_GROUP_SIZE, Shape
from ifp_mlx.benchmarking.timing import COPIES, Repeats, Timing, copy_works, measure_in_turns
from ifp_mlx.errors import UsageError
from ifp_mlx.selection.masks import top_k_indices
from ifp_mlx.slicing.compact import REQUANTIZED_DOWN_BITS
from ifp_mlx.slicing.gather import take_along_columns, take_rows

Arrays = list[mx.array]
Gather = Callable[[], Arrays]


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
    shape: Shape, *, bits: int, dtype: mx.Dtype, repeats: Repeats
) -> list[SlicingRow]:
    """Return the time of each way to gather K of F units of all layers. Evaluates.

    Args:
        shape: whose FFNs; everything else is left out.
        bits: 16 for plain weights, else packed codes with scales and biases.
        dtype: of plain weights and of scales.
        repeats: how often.

    Raises:
        UsageError: the shape has no amount of units to keep.
    """
    if shape.num_kept_units is None:
        raise UsageError(f"{shape.name} has no amount of units to keep; pass --keep-units")
    indices = top_k_indices(
        mx.random.normal((shape.num_layers, shape.num_units)), shape.num_kept_units
    )
    mx.eval(indices)
    size = int(shape.config["hidden_size"])
    if bits == 16:
        ways = plain_ways(size, shape.num_units, indices, dtype)
    else:
        ways = packed_ways(size, shape.num_units, indices, bits, dtype)
    rows: list[SlicingRow] = []
    for name, gather in ways.items():
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


def plain_ways(size: int, num_units: int, indices: mx.array, dtype: mx.Dtype) -> dict[str, Gather]:
    """Return ways to gather (L, K) ``indices`` from random plain weights; each gives the same.

    Each returns gate (K, D), up (K, D) and down, layer by layer. Down is (D, K) if the name says
    columns, else (K, D); joined layouts give the three, or all layers, as one array.
    """
    num_layers = indices.shape[0]
    # (L * 3 F, D): gate, up and transposed down of each layer, one block in memory.
    store = _joined_layers(
        lambda: mx.random.uniform(-1, 1, (3 * num_units, size), dtype=dtype), num_layers
    )
    blocks = [store[start * num_units : (start + 1) * num_units] for start in range(3 * num_layers)]
    downs = [mx.contiguous(blocks[3 * layer + 2].T) for layer in range(num_layers)]  # (D, F)
    mx.eval(blocks, downs)
    layers = [indices[layer] for layer in range(num_layers)]
    shuffled = [mx.random.permutation(units) for units in layers]
    mx.eval(layers, shuffled)

    def by_layer(take: Callable[[int, mx.array], Arrays], units: Sequence[mx.array]) -> Arrays:
        return [array for layer, chosen in enumerate(units) for array in take(layer, chosen)]

    def as_is(layer: int, units: mx.array) -> Arrays:
        gate, up = blocks[3 * layer], blocks[3 * layer + 1]
        down = mx.take(downs[layer], units, axis=1)
        return [mx.take(gate, units, axis=0), mx.take(up, units, axis=0), down]

    def wide(layer: int, units: mx.array) -> Arrays:
        rows = [take_rows(blocks[3 * layer + part], units) for part in range(2)]
        return [*rows, take_along_columns(downs[layer], units)]

    def unit_major(layer: int, units: mx.array) -> Arrays:
        return [take_rows(blocks[3 * layer + part], units) for part in range(3)]

    def unit_major_narrow(layer: int, units: mx.array) -> Arrays:
        return [mx.take(blocks[3 * layer + part], units, axis=0) for part in range(3)]

    def joined(layer: int, units: mx.array) -> Arrays:
        rows = mx.concatenate([units + part * num_units for part in range(3)])
        first = 3 * layer * num_units
        return [take_rows(store[first : first + 3 * num_units], rows)]

    def one_gather() -> Arrays:
        starts = mx.arange(3 * num_layers)[:, None] * num_units  # (3 L, 1)
        rows = starts + mx.repeat(indices, 3, axis=0)  # (3 L, K)
        return [take_rows(store, rows.reshape(-1))]

    def each_layer_evaluated() -> Arrays:
        arrays = []
        for layer, units in enumerate(layers):
            part = unit_major(layer, units)
            mx.eval(part)
            arrays += part
        return arrays

    return {
        "mx.take as it is, down by columns": lambda: by_layer(as_is, layers),
        "wide rows, down by columns along the axis": lambda: by_layer(wide, layers),
        "unit-major, mx.take as it is": lambda: by_layer(unit_major_narrow, layers),
        "unit-major, wide rows": lambda: by_layer(unit_major, layers),
        "unit-major, wide rows, units not sorted": lambda: by_layer(unit_major, shuffled),
        "unit-major, wide rows, an evaluation a layer": each_layer_evaluated,
        "unit-major, wide rows, one gather a layer": lambda: by_layer(joined, layers),
        "unit-major, wide rows, one gather for all": one_gather,
    }


def packed_ways(
    size: int, num_units: int, indices: mx.array, bits: int, dtype: mx.Dtype
) -> dict[str, Gather]:
    """Return ways to gather (L, K) ``indices`` from random weights of ``bits`` bits.

    The unit-major ways return packed weight, scales and biases of gate, up and down; the others
    return down as columns: dequantized, or quantized again at 8 bits.
    """
    num_layers = indices.shape[0]
    packed = size * bits // 32
    groups = size // QUANTIZATION_GROUP_SIZE
    rows_of_layer = 3 * num_units

    def random_codes() -> mx.array:
        return mx.random.randint(0, 2**31, (rows_of_layer, packed), dtype=mx.uint32)

    def random_scales() -> mx.array:
        return mx.random.uniform(0.01, 0.02, (rows_of_layer, groups), dtype=dtype)

    store = (
        _joined_layers(random_codes, num_layers),
        _joined_layers(random_scales, num_layers),
        _joined_layers(random_scales, num_layers),
    )
    blocks = [
        tuple(part[start * num_units : (start + 1) * num_units] for part in store)
        for start in range(3 * num_layers)
    ]
    downs = [
        mx.quantize(
            mx.random.uniform(-1, 1, (size, num_units), dtype=dtype), QUANTIZATION_GROUP_SIZE, bits
        )
        for _ in range(num_layers)
    ]
    mx.eval(blocks)
    for down in downs:
        mx.eval(down)
    layers = [indices[layer] for layer in range(num_layers)]
    mx.eval(layers)

    def by_layer(take: Callable[[int, mx.array], Arrays]) -> Arrays:
        return [array for layer, units in enumerate(layers) for array in take(layer, units)]

    def rows(
        layer: int, units: mx.array, parts: range, take: Callable[[mx.array, mx.array], mx.array]
    ) -> Arrays:
        return [take(array, units) for part in parts for array in blocks[3 * layer + part]]

    def columns(layer: int, units: mx.array) -> mx.array:
        weight = mx.dequantize(*downs[layer], group_size=QUANTIZATION_GROUP_SIZE, bits=bits)
        return take_along_columns(weight, units)

    def dequantized(layer: int, units: mx.array) -> Arrays:
        return [*rows(layer, units, range(2), take_rows), columns(layer, units)]

    def requantized(layer: int, units: mx.array) -> Arrays:
        down = mx.quantize(columns(layer, units), QUANTIZATION_GROUP_SIZE, REQUANTIZED_DOWN_BITS)
        return [*rows(layer, units, range(2), take_rows), *down]

    def one_gather() -> Arrays:
        starts = mx.arange(3 * num_layers)[:, None] * num_units
        chosen = (starts + mx.repeat(indices, 3, axis=0)).reshape(-1)
        return [take_rows(array, chosen) for array in store]

    narrow = lambda array, units: mx.take(array, units, axis=0)  # noqa: E731
    return {
        "down dequantized": lambda: by_layer(dequantized),
        "down quantized again at 8 bits": lambda: by_layer(requantized),
        "unit-major, mx.take as it is": lambda: by_layer(
            lambda layer, units: rows(layer, units, range(3), narrow)
        ),
        "unit-major, wide rows": lambda: by_layer(
            lambda layer, units: rows(layer, units, range(3), take_rows)
        ),
        "unit-major, wide rows, one gather for all": one_gather,
    }


def _joined_layers(draw: Callable[[], mx.array], num_layers: int) -> mx.array:
    # Layer by layer: the generator works in 32 bits, twice and more of what is kept.
    layers = []
    for _ in range(num_layers):
        layers.append(draw())
        mx.eval(layers[-1])
    joined = mx.concatenate(layers)
    mx.eval(joined)
    return joined


def _words(array: mx.array) -> mx.array:
    """Return an array's bytes as one row of 32-bit words, for copying."""
    whole = mx.contiguous(array)
    if whole.shape[-1] * whole.dtype.size % mx.uint32.size:
        return whole.reshape(-1).view(mx.uint32)
    # Words first: mlx counts the elements of an axis in 32 bits, and all layers of a model in one
    # array have more.
    return whole.view(mx.uint32).reshape(-1)
