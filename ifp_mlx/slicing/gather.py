"""Gathering rows and columns of weights as fast as memory allows.

A gather does its index arithmetic once an element, so elements of two bytes cost four times as
much of it as elements of eight: rows are gathered through a view as wide as their length allows.
Columns are gathered row by row into contiguous rows.
Measured in docs/latency.md; every function here gives exactly what ``mx.take`` gives.
"""

import mlx.core as mx

_WIDE = (mx.uint64, mx.uint32, mx.uint16)


def take_rows(array: mx.array, rows: mx.array) -> mx.array:
    """Return rows ``rows`` (K,) of an (N, ...) array, bit for bit: (K, ...). Lazy.

    ``array`` should be row-contiguous: viewing any other copies it whole.
    """
    if array.ndim < 2:
        return mx.take(array, rows, axis=0)
    row_bytes = array.shape[-1] * array.dtype.size
    for wide in _WIDE:
        if wide.size > array.dtype.size and row_bytes % wide.size == 0:
            return mx.take(array.view(wide), rows, axis=0).view(array.dtype)
    return mx.take(array, rows, axis=0)


def take_columns(array: mx.array, columns: mx.array) -> mx.array:
    """Return columns ``columns`` (K,) of an (N, M) array, bit for bit: (N, K). Lazy.

    Off CUDA the result is row-contiguous, as a matrix product wants it, and ascending columns are
    read in memory order: ten times as fast on the CPU. On CUDA ``mx.take`` is the faster one.
    """
    if mx.cuda.is_available():
        return mx.take(array, columns, axis=1)
    return take_along_columns(array, columns)


def take_along_columns(array: mx.array, columns: mx.array) -> mx.array:
    """Return columns ``columns`` (K,) of an (N, M) array as a row-contiguous (N, K) array. Lazy."""
    indices = mx.broadcast_to(columns, (array.shape[0], columns.size))
    return mx.take_along_axis(array, indices, axis=1)
