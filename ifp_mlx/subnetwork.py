"""Slicing: a Selection and a dense model make a compact model.

The compact model is the same mlx-lm class with ``intermediate_size`` K. Everything outside the
FFNs is the dense model's own arrays, shared and not copied, so many sub-networks of one model
cost their FFN slices and one of everything else.
"""

import dataclasses
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx import ffn
from ifp_mlx.calibration import Calibration
from ifp_mlx.selection import Selection

REQUANTIZED_DOWN_BITS = 8
"""Columns of a quantized down projection cut across its groups, so that they cannot be gathered in
packed form. At 8 bits the second rounding is far below the first."""


def slice_model(
    model: nn.Module, selection: Selection, *, compensation: Calibration | None = None
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

    Returns:
        A new model of the same class. Lazy: evaluate its parameters to do the gathers.

    Raises:
        SelectionError: the selection does not fit the model.
    """
    selection.validate(model)
    layout = ffn.ffn_layout(model.args.model_type)
    compact: nn.Module = ffn.clone_module(model)
    compact.args = _compact_args(model.args, selection.num_kept_units)
    removed_means = None
    if compensation is not None:
        removed_means = compensation.mean_activation * (1 - selection.mask())  # (L, F)
    for layer, module in enumerate(ffn.ffn_modules(compact)):
        indices = selection.indices[layer]  # (K,)
        values = None if selection.mask_values is None else selection.mask_values[layer]
        rows = mx.concatenate([indices, indices + selection.num_units]) if layout.fused else indices
        down = module[layout.down]
        for name in layout.row_projections:
            module[name] = slice_rows(module[name], rows)
        module[layout.down] = slice_columns(down, indices, values)
        if removed_means is not None:
            # (D, F) @ (F,) contracts the units; those that are kept have mean 0 here.
            offset = ffn.dense_weight(down).astype(mx.float32) @ removed_means[layer]
            _add_bias(module[layout.down], offset.astype(ffn.dense_weight(down).dtype))
    return compact


def _compact_args(args: object, num_kept_units: int) -> object:
    # gpt2 has no such field: its width is 4 * n_embd, and nothing but the weights holds it.
    if dataclasses.is_dataclass(args) and hasattr(args, "intermediate_size"):
        return dataclasses.replace(args, intermediate_size=num_kept_units)  # type: ignore[type-var]
    return args


def slice_rows(linear: nn.Module, rows: mx.array) -> nn.Module:
    """Return a linear layer with the given output rows: bit-exact, packed weights stay packed."""
    sliced: nn.Module = ffn.clone_module(linear)
    for name in ("weight", "scales", "biases", "bias"):
        if linear.get(name) is not None:
            sliced[name] = mx.take(linear[name], rows, axis=0)
    return sliced


def slice_columns(
    linear: nn.Module, columns: mx.array, values: mx.array | None = None
) -> nn.Module:
    """Return a linear layer with the given input columns, each times its value if there are any.

    A quantized layer comes back quantized at 8 bits where its group size divides the number of
    columns, else as plain weights.
    """
    weight = mx.take(ffn.dense_weight(linear), columns, axis=1)  # (D, F) -> (D, K)
    if values is not None:
        weight = weight * values.astype(weight.dtype)
    if not isinstance(linear, nn.QuantizedLinear):
        sliced: nn.Module = ffn.clone_module(linear)
        sliced.weight = weight
        return sliced
    plain = nn.Linear(1, 1, bias="bias" in linear)
    plain.weight = weight
    if "bias" in linear:
        plain.bias = linear.bias
    group_size = max(int(linear.group_size), 32)
    if columns.size % group_size:
        return plain
    quantized: nn.Module = nn.QuantizedLinear.from_linear(plain, group_size, REQUANTIZED_DOWN_BITS)
    return quantized


def down_requantization_error(model: nn.Module, compact: nn.Module, selection: Selection) -> float:
    """Return the relative error that requantizing the down projections cost. Evaluates.

    The Frobenius norm of the difference between the compact columns and the dense ones, over the
    norm of the dense ones, across all layers; 0 for plain weights.
    """
    name = ffn.ffn_layout(model.args.model_type).down
    difference, reference = mx.array(0.0), mx.array(0.0)
    pairs = zip(ffn.ffn_modules(model), ffn.ffn_modules(compact), strict=True)
    for layer, (dense, cut) in enumerate(pairs):
        exact = slice_columns(_dequantized(dense[name]), selection.indices[layer])
        exact_weight = exact.weight.astype(mx.float32)
        delta = ffn.dense_weight(cut[name]).astype(mx.float32) - exact_weight
        difference = difference + (delta * delta).sum()
        reference = reference + (exact_weight * exact_weight).sum()
    return cast(float, mx.sqrt(difference / reference).item())


def _dequantized(linear: nn.Module) -> nn.Module:
    plain = nn.Linear(1, 1, bias=False)
    plain.weight = ffn.dense_weight(linear)
    return plain


def _add_bias(linear: nn.Module, offset: mx.array) -> None:
    linear.bias = linear.bias + offset if "bias" in linear else offset
