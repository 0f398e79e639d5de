"""Fast gathers give what ``mx.take`` gives, bit for bit."""

import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.slicing.gather import take_columns, take_rows

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
