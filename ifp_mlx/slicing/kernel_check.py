"""A check of the quantized kernels, once a process, before anyone trusts their answers.

Wrong results of a kernel are silent. A few rows are multiplied with the kernel in use and with
their dequantized values; where the two disagree, the model is dequantized instead.
"""

import functools
import logging

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.slicing.compact import slice_rows
from ifp_mlx.units.modules import clone_module, dequantized, is_packed

logger = logging.getLogger(__name__)

_ROWS = 64
# One token takes the matrix-vector kernel, several the matrix-matrix kernel.
_TOKENS = (1, 33)
_TOLERANCE = 0.02  # half-precision sums over a few thousand values stay below 0.005


def check_quantized_kernels(model: nn.Module) -> nn.Module:
    """Return ``model``, or its dequantized copy where a kernel that it uses is wrong. Evaluates.

    Each quantization that occurs is checked once a process, on the first layer that has it.

    A wrong kernel is logged as a warning. ``model`` itself is not changed.
    """
    for linear in _first_of_each_kind(model):
        if not _is_right(linear):
            logger.warning(
                "the %d-bit %s kernel of this machine gives wrong results; using dequantized "
                "weights, which take more memory. Please report it",
                linear.bits,
                linear.mode,
            )
            return _dequantized_copy(model)
    return model


def kernel_error(linear: nn.Module) -> float:
    """Return the worst relative error of a quantized layer's kernel on a few rows. Evaluates."""
    is_stack = linear.weight.ndim == 3
    rows = slice_rows(linear, mx.arange(1 if is_stack else min(_ROWS, linear.weight.shape[0])))
    weight = dequantized(rows, mx.float32)  # (rows, D), of the first expert of a stack
    weight = weight[0] if is_stack else weight
    dtype = linear.scales.dtype if linear.mode == "affine" else mx.bfloat16
    worst = 0.0
    for num_tokens in _TOKENS:
        inputs = mx.random.normal((num_tokens, weight.shape[1]), key=mx.random.key(num_tokens))
        expected = inputs.astype(dtype).astype(mx.float32) @ weight.T
        if "bias" in rows:
            expected = expected + (rows.bias[0] if is_stack else rows.bias)
        product = _product(rows, inputs.astype(dtype)).astype(mx.float32)
        difference = mx.linalg.norm(product - expected)
        error = difference / mx.linalg.norm(expected)
        worst = max(worst, float(error.item()))  # type: ignore[arg-type]
    return worst


def _product(linear: nn.Module, inputs: mx.array) -> mx.array:
    """Return what a layer makes of (T, D) inputs; of a stack, its first expert."""
    if linear.weight.ndim == 2:
        return linear(inputs)  # type: ignore[no-any-return]
    experts = mx.zeros((len(inputs), 1), dtype=mx.int32)
    products: mx.array = linear(inputs[:, None, None], experts)  # (T, 1, 1, rows)
    return products[:, 0, 0]


_Kind = tuple[str, int, int, int]


def _kind(linear: nn.Module) -> _Kind:
    return linear.mode, linear.bits, linear.group_size, linear.weight.ndim


def _first_of_each_kind(model: nn.Module) -> list[nn.Module]:
    kinds: dict[_Kind, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.QuantizedLinear) or (
            is_packed(module) and hasattr(module, "num_experts")
        ):
            kinds.setdefault(_kind(module), module)
    return list(kinds.values())


@functools.cache
def _checked() -> dict[_Kind, bool]:
    return {}


def _is_right(linear: nn.Module) -> bool:
    kind = _kind(linear)
    if kind not in _checked():
        _checked()[kind] = kernel_error(linear) < _TOLERANCE
    return _checked()[kind]


def _dequantized_copy(model: nn.Module) -> nn.Module:
    from mlx_lm.utils import dequantize_model

    plain: nn.Module = dequantize_model(clone_module(model))
    mx.eval(plain.parameters())
    return plain
