"""What text shows of FFN units: how strongly they fire."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.units.masks import downs, with_observed_units
from ifp_mlx.units.modules import dense_weight, trunk, unit_shape


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

    def read(self, token_ids: Sequence[int]) -> None:
        """Have the model read a text. Evaluates."""
        rows: list[mx.array] = []

        def observe(activations: mx.array) -> None:
            units = activations.reshape(-1, activations.shape[-1]).astype(mx.float32)  # (B*T, F)
            rows.append((units * units).sum(axis=0))
            mx.async_eval(rows[-1])  # so that a layer's activations are not kept to the end

        trunk(with_observed_units(self._model, observe))(mx.array([list(token_ids)]), None)
        self._squares = self._squares + mx.stack(rows)
        self._num_tokens += len(token_ids)
        mx.eval(self._squares)

    def importance(self) -> mx.array:
        """Return (L, F) float32: root mean square activation times the norm of the column."""
        return mx.sqrt(self._squares / self._num_tokens) * down_column_norms(self._model)

    @staticmethod
    def prior(of_tasks: Sequence["FfnStatistics"]) -> mx.array:
        """Return (L, F) float32: the mean importance, so that no task dominates by size."""
        return mx.stack([statistics.importance() for statistics in of_tasks]).mean(axis=0)

    @staticmethod
    def of_instruction(
        model: nn.Module, token_ids: Sequence[int], criterion: str | None = None
    ) -> mx.array:
        """Return how strongly an instruction activates each unit: (L, F) float32. Evaluates.

        Source: GRIFFIN (Dong et al. 2024, arXiv 2404.01365): each token's activations normalised
        to unit length, a unit's score the L2 norm over the tokens.
        """
        assert criterion is None, "FFN units have one"
        rows: list[mx.array] = []

        def observe(activations: mx.array) -> None:
            units = activations[0].astype(mx.float32)  # (T, F)
            length = mx.linalg.norm(units, axis=-1, keepdims=True)
            rows.append(mx.linalg.norm(units / mx.maximum(length, 1e-12), axis=0))  # over T
            mx.async_eval(rows[-1])  # so that a layer's activations are not kept to the end

        hidden = trunk(with_observed_units(model, observe))(mx.array([list(token_ids)]), None)
        mx.eval(hidden, rows)
        return mx.stack(rows)  # (L, F)


def down_column_norms(model: nn.Module) -> mx.array:
    """Return (L, F) float32: the L2 norm of each unit's column of the down projection."""
    return mx.stack(
        [mx.linalg.norm(dense_weight(down).astype(mx.float32), axis=0) for down in downs(model)]
    )
