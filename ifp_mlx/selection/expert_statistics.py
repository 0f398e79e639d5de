"""What text shows of a mixture's experts: how often they are asked, and what they add."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import UsageError
from ifp_mlx.units.modules import trunk, unit_shape
from ifp_mlx.units.routing import Routing, with_observed_experts

CRITERIA = ("contribution", "frequency", "gate", "reap", "norm")
"""What experts can be scored by. The first is the default: a task needs what adds most to its
tokens. The others are controls, but for the last, which is the prior of all text."""


class ExpertStatistics:
    """Sums over the tokens of the text that was read, each (L, E) float32.

    Source: REAP (Lasby et al. 2025) for the mean of gate times norm; for one task its sum, and for
    all text the mean norm alone, do better (arXiv 2606.15716).
    """

    def __init__(self, model: nn.Module):
        shape = unit_shape(model)
        self._model = model
        self._num_experts = shape.num_units
        self._num_tokens = 0
        # For each expert: how often it was asked, its gate values, norms, gates times norms.
        self._sums = mx.zeros((4, len(shape.layers), shape.num_units))

    def read(self, token_ids: Sequence[int]) -> None:
        """Have the model read a text. Evaluates."""
        rows: list[mx.array] = []

        def observe(routing: Routing) -> None:
            gates, norms = routing.gates, routing.norms
            values = (mx.ones_like(gates), gates, norms, gates * norms)
            rows.append(mx.stack([self._sum(routing.experts, value) for value in values]))
            mx.async_eval(rows[-1])  # so that a layer's outputs are not kept to the end

        trunk(with_observed_experts(self._model, observe))(mx.array([list(token_ids)]), None)
        self._sums = self._sums + mx.stack(rows, axis=1)
        self._num_tokens += len(token_ids)
        mx.eval(self._sums)

    def score(self, criterion: str) -> mx.array:
        """Return (L, E) float32 by one of ``CRITERIA``; sums are per token that was read.

        Raises:
            UsageError: there is no such criterion.
        """
        frequency, gates, norms, contributions = self._sums
        asked = mx.maximum(frequency, 1.0)
        match criterion:
            case "contribution":
                return contributions / self._num_tokens
            case "frequency":
                return frequency / self._num_tokens
            case "gate":
                return gates / self._num_tokens
            case "reap":
                return contributions / asked
            case "norm":
                return norms / asked
        raise UsageError(f"no criterion {criterion!r}; there are: {', '.join(CRITERIA)}")

    def importance(self) -> mx.array:
        """Return (L, E) float32: what each expert adds, a token."""
        return self.score("contribution")

    @staticmethod
    def prior(of_tasks: Sequence["ExpertStatistics"]) -> mx.array:
        """Return (L, E) float32: the mean norm of an expert's output where it was asked."""
        total = ExpertStatistics(of_tasks[0]._model)
        total._sums = mx.stack([statistics._sums for statistics in of_tasks]).sum(axis=0)
        return total.score("norm")

    @staticmethod
    def of_instruction(
        model: nn.Module, token_ids: Sequence[int], criterion: str | None = None
    ) -> mx.array:
        """Return (L, E) float32 scores of the experts for an instruction. Evaluates.

        Raises:
            UsageError: there is no such criterion.
        """
        statistics = ExpertStatistics(model)
        statistics.read(token_ids)
        return statistics.score(criterion or CRITERIA[0])

    def _sum(self, experts: mx.array, values: mx.array) -> mx.array:
        """Return (E,): the sum of the values (T, k) that belong to each expert (T, k)."""
        zeros = mx.zeros(self._num_experts)
        return zeros.at[experts.flatten()].add(values.flatten())
