"""Having a model read several texts at once: one on the disk is read once for all of them."""

import collections
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ifp_mlx.units.modules import trunk

_PASS_TOKENS = 8192
"""Texts are read together up to so many tokens, padding counted."""


def pad_right(sequences: Sequence[Sequence[int]], width: int = 0) -> tuple[mx.array, mx.array]:
    """Return (B, T) int32 ids, padded with 0 on the right, and the (B,) int32 lengths.

    Under a causal mask what stands to the right of a token cannot change it, so the padding
    needs no mask of its own. T is the longest sequence, or ``width`` if that is more.
    """
    longest = max(width, *(len(sequence) for sequence in sequences))
    ids = np.zeros((len(sequences), longest), dtype=np.int32)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    return mx.array(ids), mx.array(lengths)


class Inside:
    """Which positions of a batch are text, for observers that see a few rows of it at a time.

    Args:
        lengths: (B,) int32.
        width: T.
    """

    def __init__(self, lengths: mx.array, width: int):
        self._inside = mx.arange(width) < lengths[:, None]
        self._num_seen: collections.Counter[int] = collections.Counter()

    def of_next(self, position: int, num_rows: int) -> mx.array:
        """Return (num_rows, T) bool: of the rows that a layer, by its position, passes next."""
        first = self._num_seen[position]
        self._num_seen[position] += num_rows
        return self._inside[first : first + num_rows]


def read_in_passes(
    texts: Sequence[Sequence[int]],
    observed: Callable[[Inside], nn.Module],
) -> Iterator[mx.array]:
    """Have a model read texts, as many at once as is sensible; yield after each pass. Lazy.

    Args:
        texts: token ids, none of them empty.
        observed: returns the model with observers for one pass.

    Yields:
        The pass's last hidden states: evaluate them, or what was observed.
    """
    for batch in _batches(texts):
        ids, lengths = pad_right(batch)
        yield trunk(observed(Inside(lengths, ids.shape[1])))(ids, None)


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    begin = longest = 0
    for at, text in enumerate(texts):
        longest = max(longest, len(text))
        if at > begin and longest * (at + 1 - begin) > _PASS_TOKENS:
            yield texts[begin:at]
            begin, longest = at, len(text)
    if texts:
        yield texts[begin:]
