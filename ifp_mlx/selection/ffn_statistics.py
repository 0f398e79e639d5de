"""What text shows of FFN units: how strongly they fire."""

import collections
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.selection.reading import Inside, read_in_passes
from ifp_mlx.units.masks import downs, with_observed_units
from ifp_mlx.units.modules import dense_weight, unit_shape

Measure = Callable[[mx.array, mx.array], mx.array]
"""From (b, T, F) float32 activations and (b, T, 1) bool, which of them are text, to (b, F)."""


class FfnStatistics:
    """Squares of activations, summed over the text that was read.

    Source: Wanda (Sun et al. 2023) scores a weight by |W| * ||X||; summed over a unit's output
    column this is the norm product used here.
    """

    def __init__(self, model: nn.Module):
        shape = unit_shape(model)
        self._model = model
        self._squares = mx.zeros((len(shape.layers), shape.num_units))
        self._num_tokens = 0

    def read(self, texts: Sequence[Sequence[int]]) -> None:
        """Have the model read some texts. Evaluates."""
        self._squares = self._squares + _measured(self._model, texts, _squares).sum(axis=0)
        self._num_tokens += sum(len(text) for text in texts)
        mx.eval(self._squares)

    def importance(self) -> mx.array:
        """Return (L, F) float32: root mean square activation times the norm of the column."""
        return mx.sqrt(self._squares / self._num_tokens) * down_column_norms(self._model)

    @staticmethod
    def prior(of_tasks: Sequence["FfnStatistics"]) -> mx.array:
        """Return (L, F) float32: the mean importance, so that no task dominates by size."""
        return mx.stack([statistics.importance() for statistics in of_tasks]).mean(axis=0)

    @staticmethod
    def of_instructions(
        model: nn.Module, texts: Sequence[Sequence[int]], criterion: str | None = None
    ) -> mx.array:
        """Return how strongly each text activates each unit: (N, L, F) float32. Evaluates.

        Source: GRIFFIN (Dong et al. 2024, arXiv 2404.01365): each token's activations normalised
        to unit length, a unit's score the L2 norm over the tokens.
        """
        assert criterion is None, "FFN units have one"
        return _measured(model, texts, _normalised)


def _squares(units: mx.array, inside: mx.array) -> mx.array:
    return (units * units * inside).sum(axis=1)


def _normalised(units: mx.array, inside: mx.array) -> mx.array:
    length = mx.linalg.norm(units, axis=-1, keepdims=True)
    return mx.linalg.norm(units / mx.maximum(length, 1e-12) * inside, axis=1)


def _measured(model: nn.Module, texts: Sequence[Sequence[int]], measure: Measure) -> mx.array:
    """Return (N, L, F) float32: what a measure finds in each text. Evaluates."""
    passes: list[mx.array] = []
    rows: collections.defaultdict[int, list[mx.array]] = collections.defaultdict(list)

    def observed(inside: Inside) -> nn.Module:
        def observe(position: int, activations: mx.array) -> None:
            is_text = inside.of_next(position, activations.shape[0])[..., None]
            rows[position].append(measure(activations.astype(mx.float32), is_text))
            mx.async_eval(rows[position][-1])  # or a layer's activations are kept to the end

        return with_observed_units(model, observe)

    for hidden in read_in_passes(texts, observed):
        passes.append(mx.stack([mx.concatenate(rows[layer]) for layer in sorted(rows)], axis=1))
        mx.eval(hidden, passes)
        rows.clear()
    return mx.concatenate(passes)


def down_column_norms(model: nn.Module) -> mx.array:
    """Return (L, F) float32: the L2 norm of each unit's column of the down projection."""
    return mx.stack(
        [mx.linalg.norm(dense_weight(down).astype(mx.float32), axis=0) for down in downs(model)]
    )
