"""Slicing: a Selection and a dense model make a compact model.

The compact model is the same mlx-lm class with ``intermediate_size`` K. Everything outside the
FFNs is the dense model's own arrays, shared and not copied, so many sub-networks of one model
cost their FFN slices and one of everything else.

Quantized checkpoints: gate and up rows are gathered packed, bit for bit. Columns of the down
projection cut across its quantization groups, so they are taken apart and quantized again at 8
bits, whose error is measured. Where exactness is asked for, they are kept as plain weights, or the
packed projection stays whole (``whole_down``), whichever is smaller.
"""

import dataclasses
from collections.abc import Generator
from typing import Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.gather import UnitMajorLinear, take_columns, take_rows
from ifp_mlx.slicing.whole_down import WholeDown, is_smaller_whole
from ifp_mlx.units import ffn

REQUANTIZED_DOWN_BITS = 8
"""At 8 bits the second rounding of a down projection is far below the first."""

_ROW_PARTS = ("weight", "scales", "biases", "bias")


@dataclasses.dataclass(frozen=True)
class GatheredUnits:
    """The kept FFN units of one layer.

    Attributes:
        row_projections: name -> linear layer with the kept output rows, packed if it was packed.
        columns: (D, K) the kept columns of the down projection, dequantized.
    """

    row_projections: dict[str, nn.Module]
    columns: mx.array


class UnitSource(Protocol):
    """Where FFN units come from: a model in memory or a checkpoint on disk."""

    def gather(self, layer: int, units: mx.array) -> GatheredUnits:
        """Return the given (K,) int32 units of a layer."""

    def rows(self, layer: int, units: mx.array) -> dict[str, nn.Module]:
        """Return only the row projections of the given units."""

    def down(self, layer: int) -> nn.Module:
        """Return a layer's down projection as it is stored."""

    def down_product(self, layer: int, activations: mx.array) -> mx.array:
        """Return (D,) float32: a layer's down projection times (F,) unit activations."""


class ResidentUnits:
    """The units of a model in memory. Lazy."""

    def __init__(self, model: nn.Module):
        self._layout = ffn.ffn_layout(model.args.model_type)
        self._ffns = ffn.ffn_modules(model)
        self._num_units = ffn.num_units(model)
        self._dtype = compute_dtype(model)

    def gather(self, layer: int, units: mx.array) -> GatheredUnits:
        """Return the given units of a layer."""
        return GatheredUnits(self.rows(layer, units), self._columns(self.down(layer), units))

    def rows(self, layer: int, units: mx.array) -> dict[str, nn.Module]:
        """Return the row projections of the given units."""
        module = self._ffns[layer]
        rows = mx.concatenate([units, units + self._num_units]) if self._layout.fused else units
        return {name: slice_rows(module[name], rows) for name in self._layout.row_projections}

    def down(self, layer: int) -> nn.Module:
        """Return a layer's down projection."""
        return cast(nn.Module, self._ffns[layer][self._layout.down])

    def _columns(self, down: nn.Module, units: mx.array) -> mx.array:
        if isinstance(down, UnitMajorLinear):
            return down.columns(units)
        return take_columns(dequantized(down, self._dtype), units)

    def down_product(self, layer: int, activations: mx.array) -> mx.array:
        """Return the down projection times unit activations; contracts the units."""
        return dequantized(self.down(layer), self._dtype).astype(mx.float32) @ activations


@dataclasses.dataclass
class RequantizationError:
    """Sums over down projections that were quantized again. Lazy until ``relative`` is read."""

    squared_difference: mx.array = dataclasses.field(default_factory=lambda: mx.array(0.0))
    squared_reference: mx.array = dataclasses.field(default_factory=lambda: mx.array(0.0))

    def add(self, exact: mx.array, actual: mx.array) -> None:
        """Count one layer's (D, K) columns, exact and as they are now."""
        exact = exact.astype(mx.float32)
        delta = actual.astype(mx.float32) - exact
        # Row by row first: one float32 sum of a million squares is off by a ten-thousandth.
        self.squared_difference = self.squared_difference + (delta * delta).sum(axis=-1).sum()
        self.squared_reference = self.squared_reference + (exact * exact).sum(axis=-1).sum()

    @property
    def relative(self) -> float:
        """Frobenius norm of the difference over that of the exact columns. Evaluates."""
        if not self.squared_difference.item():
            return 0.0
        return cast(float, mx.sqrt(self.squared_difference / self.squared_reference).item())


def slice_model(
    model: nn.Module,
    selection: Selection,
    *,
    compensation: Calibration | None = None,
    exact_down: bool = False,
    error: RequantizationError | None = None,
) -> nn.Module:
    """Return the compact model that keeps the selected FFN units.

    It equals the dense model with all other units masked to zero: exactly in real arithmetic for
    plain weights; on quantized ones gate and up rows are gathered bit for bit and the down
    projection is quantized again (``down_requantization_error`` measures what that costs).

    Args:
        model: the dense mlx-lm model; it is not changed.
        selection: which units; validated against the model before anything is gathered, because
            ``mx.take`` reads out of range without complaint.
        compensation: adds the mean contribution of the removed units as a bias of the down
            projection (FLAP, An et al. 2024).
        exact_down: do not quantize down projections again: keep kept columns as plain weights,
            or the packed projection whole where that is smaller.
        error: counts the down projections that are quantized again.

    Returns:
        A new model of the same class. Lazy: evaluate its parameters to do the gathers.

    Raises:
        SelectionError: the selection does not fit the model.
    """
    selection.validate(model)
    compact = compact_skeleton(model, selection)
    filling = fill_layers(compact, selection, ResidentUnits(model), compensation, exact_down, error)
    for _ in filling:
        pass
    return compact


def compact_skeleton(model: nn.Module, selection: Selection) -> nn.Module:
    """Return a copy of ``model``, sharing all but its FFN modules, that says it has K units."""
    compact = ffn.with_own_ffns(model)
    # gpt2 has no such field: its width is 4 * n_embd, and nothing but the weights holds it.
    if dataclasses.is_dataclass(model.args) and hasattr(model.args, "intermediate_size"):
        compact.args = dataclasses.replace(
            model.args,  # type: ignore[type-var]
            intermediate_size=selection.num_kept_units,
        )
    return compact


def fill_layers(
    compact: nn.Module,
    selection: Selection,
    source: UnitSource,
    compensation: Calibration | None = None,
    exact_down: bool = False,
    error: RequantizationError | None = None,
) -> Generator[int, None, None]:
    """Replace each FFN of a ``compact_skeleton`` by the selected units; yield which one was. Lazy.

    Args:
        compact: changed in place, layer by layer.
        selection: validated.
        source: where the units come from.
        compensation: as in ``slice_model``.
        exact_down: as in ``slice_model``.
        error: as in ``slice_model``.
    """
    cut = _Cut(
        layout=ffn.ffn_layout(compact.args.model_type),
        dtype=compute_dtype(compact),
        selection=selection,
        source=source,
        compensation=compensation,
        exact_down=exact_down,
        error=error,
    )
    for layer, module in enumerate(ffn.ffn_modules(compact)):
        _fill_layer(module, layer, cut)
        yield layer


@dataclasses.dataclass(frozen=True)
class _Cut:
    """What is the same for every layer of a compact model that is filled."""

    layout: ffn.FFNLayout
    dtype: mx.Dtype
    selection: Selection
    source: UnitSource
    compensation: Calibration | None
    exact_down: bool
    error: RequantizationError | None


def _fill_layer(module: nn.Module, layer: int, cut: _Cut) -> None:
    layout, source, selection = cut.layout, cut.source, cut.selection
    indices = selection.units(layer)
    values = None if selection.mask_values is None else selection.mask_values[layer]
    dtype = cut.dtype
    whole = cut.exact_down and is_smaller_whole(module[layout.down], len(indices), dtype)
    if whole:
        projections = source.rows(layer, indices)
    else:
        units = source.gather(layer, indices)
        projections = units.row_projections
    if values is not None and _can_scale_rows(projections):
        projections = {**projections, "up_proj": scale_rows(projections["up_proj"], values)}
        values = None
    if whole:
        down = ffn.clone_module(source.down(layer))
    else:
        columns = units.columns
        if values is not None:
            columns = (columns * values).astype(columns.dtype)
        dtype = columns.dtype
        down = make_down(module[layout.down], columns, exact=cut.exact_down)
        if cut.error is not None and isinstance(down, nn.QuantizedLinear):
            cut.error.add(columns, dequantized(down, mx.float32))
    if cut.compensation is not None:
        removed = 1 - selection.mask()[layer]  # (F,)
        offset = source.down_product(layer, cut.compensation.mean_activation[layer] * removed)
        _add_bias(down, offset.astype(dtype))
    for name, linear in projections.items():
        module[name] = linear
    module[layout.down] = WholeDown(down, indices, values) if whole else down


def slice_rows(linear: nn.Module, rows: mx.array) -> nn.Module:
    """Return a linear layer with the given output rows: bit-exact, packed weights stay packed."""
    sliced: nn.Module = ffn.clone_module(linear)
    for name in _ROW_PARTS:
        if linear.get(name) is not None:
            sliced[name] = take_rows(linear[name], rows)
    return sliced


def scale_rows(linear: nn.Module, values: mx.array) -> nn.Module:
    """Return an affinely quantized layer with each output row times its value: codes stay."""
    scaled: nn.Module = ffn.clone_module(linear)
    for name in ("scales", "biases", "bias"):
        if linear.get(name) is not None:
            part = linear[name]
            factors = values if part.ndim == 1 else values[:, None]
            scaled[name] = (part * factors).astype(part.dtype)
    return scaled


def make_down(down: nn.Module, columns: mx.array, *, exact: bool) -> nn.Module:
    """Return a down projection with the given (D, K) columns and the bias of ``down``.

    In place of a quantized layer comes one of 8 bits, if its group size divides K and ``exact``
    is not asked for; else plain weights.
    """
    plain = ffn.plain_linear(columns, down.get("bias"))
    if not isinstance(down, nn.QuantizedLinear) or exact:
        return plain
    group_size = max(int(down.group_size), 32)
    if columns.shape[1] % group_size:
        return plain
    quantized: nn.Module = nn.QuantizedLinear.from_linear(plain, group_size, REQUANTIZED_DOWN_BITS)
    return quantized


def with_cut_downs(model: nn.Module) -> nn.Module:
    """Return a copy of a compact model, sharing its arrays, in which no down projection is whole.

    That is an ordinary model of K units a layer; kept columns are plain weights in it. Lazy.
    """
    dtype = compute_dtype(model)

    def cut(_: int, down: nn.Module) -> nn.Module:
        if not isinstance(down, WholeDown):
            return down
        columns = take_columns(dequantized(down.down, dtype), down.units)  # (D, F) -> (D, K)
        if down.factors is not None:
            columns = (columns * down.factors).astype(dtype)
        return ffn.plain_linear(columns, down.down.get("bias"))

    return ffn.with_wrapped_down(model, cut)


def down_requantization_error(model: nn.Module, compact: nn.Module, selection: Selection) -> float:
    """Return the relative error that requantizing the down projections cost. Evaluates.

    The Frobenius norm of the difference between the compact columns and the dense ones, over the
    norm of the dense ones, across all layers; 0 for plain weights.
    """
    name = ffn.ffn_layout(model.args.model_type).down
    source = ResidentUnits(model)
    error = RequantizationError()
    for layer, module in enumerate(ffn.ffn_modules(compact)):
        if isinstance(module[name], nn.QuantizedLinear):
            columns = source.gather(layer, selection.indices[layer]).columns
            error.add(columns, dequantized(module[name], mx.float32))
    return error.relative


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """Return the floating type that a model computes in: that of its first layer's norms."""
    # Parameters alone: a scaled rotary embedding keeps a float32 vector of frequencies beside them.
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.layers[0].parameters()))
    vectors = [a for _, a in parameters if a.ndim == 1 and mx.issubdtype(a.dtype, mx.floating)]
    return vectors[0].dtype


def dequantized(linear: nn.Module, dtype: mx.Dtype) -> mx.array:
    """Return the (out, in) weight of a linear layer: plain ones as they are, packed ones in dtype.

    Scales are cast first, so that a float32 result is not rounded to the type they are stored in:
    ``quantized_matmul`` with float32 activations does the same.
    """
    if not isinstance(linear, nn.QuantizedLinear):
        return ffn.dense_weight(linear)
    wide: nn.Module = ffn.clone_module(linear)
    if linear.mode == "affine":
        for name in ("scales", "biases"):
            wide[name] = linear[name].astype(dtype)
    return ffn.dense_weight(wide).astype(dtype)


def _can_scale_rows(projections: dict[str, nn.Module]) -> bool:
    # Only up is linear in what it multiplies, and only affine scales are ordinary numbers.
    up = projections.get("up_proj")
    return isinstance(up, nn.QuantizedLinear) and up.mode == "affine"


def _add_bias(linear: nn.Module, offset: mx.array) -> None:
    linear.bias = linear.bias + offset if "bias" in linear else offset
