"""Fast gathers give what ``mx.take`` gives, bit for bit."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.selection.selection import RandomSelector, select
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.slicing.gather import UnitMajorLinear, take_columns, take_rows, with_unit_major_downs
from ifp_mlx.units import ffn

ROWS = mx.array([0, 3, 4, 8], dtype=mx.int32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8])
@pytest.mark.parametrize("width", [1, 2, 3, 6, 16, 20])
def test_take_rows_equals_numpy(dtype: mx.Dtype, width: int) -> None:
    array = mx.random.randint(0, 100, (9, width)).astype(dtype)
    expected = np.array(array.astype(mx.float32))[np.array(ROWS)]
    actual = take_rows(array, ROWS)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(np.array(actual.astype(mx.float32)), expected)


def test_take_rows_keeps_the_bits_of_every_float() -> None:
    array = mx.array([[float("nan"), -0.0, float("inf"), 1e-40]] * 2)
    actual = take_rows(array, mx.array([1]))
    assert mx.array_equal(actual.view(mx.uint32), array[1:].view(mx.uint32)).item()


def test_take_rows_of_a_vector_and_of_a_stack() -> None:
    vector, stack = mx.arange(9), mx.random.normal((9, 2, 4))
    np.testing.assert_array_equal(np.array(take_rows(vector, ROWS)), np.array(ROWS))
    np.testing.assert_array_equal(np.array(take_rows(stack, ROWS)), np.array(stack)[np.array(ROWS)])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_take_columns_equals_numpy(dtype: mx.Dtype) -> None:
    array = mx.random.normal((5, 9)).astype(dtype)
    expected = np.array(array.astype(mx.float32))[:, np.array(ROWS)]
    actual = take_columns(array, ROWS)
    np.testing.assert_array_equal(np.array(actual.astype(mx.float32)), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_unit_major_linear_is_the_same_layer(bias: bool) -> None:
    linear = nn.Linear(9, 5, bias=bias)
    other = UnitMajorLinear.from_linear(linear)
    x = mx.random.normal((2, 9))
    assert mx.array_equal(other.weight, linear.weight).item()
    assert mx.allclose(other(x), linear(x), atol=1e-6).item()
    assert mx.array_equal(other.columns(ROWS), mx.take(linear.weight, ROWS, axis=1)).item()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "phi", "starcoder2"])
def test_slices_of_a_unit_major_model_are_the_same(family, tiny_model) -> None:
    model = tiny_model(family)
    selection = select(RandomSelector(3, 192), [1], 64)
    expected = slice_model(model, selection)
    actual = slice_model(with_unit_major_downs(model), selection)
    down = ffn.ffn_layout(family).down
    for ours, theirs in zip(ffn.ffn_modules(actual), ffn.ffn_modules(expected), strict=True):
        assert mx.array_equal(ours[down].weight, theirs[down].weight).item()
    ids = mx.array([[3, 1, 4, 1, 5]])
    assert mx.allclose(actual(ids), expected(ids), atol=1e-4).item()


def test_quantized_downs_stay_as_they_are(tiny_model) -> None:
    model = tiny_model()
    nn.quantize(model, group_size=32, bits=4)
    other = with_unit_major_downs(model)
    for ours, theirs in zip(ffn.ffn_modules(other), ffn.ffn_modules(model), strict=True):
        assert type(ours.down_proj) is nn.QuantizedLinear
        assert ours.down_proj.weight is theirs.down_proj.weight
