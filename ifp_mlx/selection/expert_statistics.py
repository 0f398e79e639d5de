"""What text shows of a mixture's experts: how often they are asked, and what they add."""

import collections
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import UsageError
from ifp_mlx.selection.reading import Inside, read_in_passes
from ifp_mlx.units.modules import unit_shape
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
        self._num_tokens = 0
        # For each expert: how often it was asked, its gate values, norms, gates times norms.
        self._sums = mx.zeros((4, len(shape.layers), shape.num_units))

    def read(self, texts: Sequence[Sequence[int]]) -> None:
        """Have the model read some texts. Evaluates."""
        self._sums = self._sums + _sums(self._model, texts).sum(axis=0)
        self._num_tokens += sum(len(text) for text in texts)
        mx.eval(self._sums)

    def score(self, criterion: str) -> mx.array:
        """Return (L, E) float32 by one of ``CRITERIA``; sums are per token that was read.

        Raises:
            UsageError: there is no such criterion.
        """
        return _score(self._sums, self._num_tokens, criterion)

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
    def of_instructions(
        model: nn.Module, texts: Sequence[Sequence[int]], criterion: str | None = None
    ) -> mx.array:
        """Return (N, L, E) float32 scores of the experts for each text. Evaluates.

        Raises:
            UsageError: there is no such criterion.
        """
        found = zip(_sums(model, texts), texts, strict=True)
        return mx.stack([_score(sums, len(text), criterion or CRITERIA[0]) for sums, text in found])


def _score(sums: mx.array, num_tokens: int, criterion: str) -> mx.array:
    """Return (L, E): what (4, L, E) sums over some tokens say by a criterion."""
    frequency, gates, norms, contributions = sums
    asked = mx.maximum(frequency, 1.0)
    match criterion:
        case "contribution":
            return contributions / num_tokens
        case "frequency":
            return frequency / num_tokens
        case "gate":
            return gates / num_tokens
        case "reap":
            return contributions / asked
        case "norm":
            return norms / asked
    raise UsageError(f"no criterion {criterion!r}; there are: {', '.join(CRITERIA)}")


def _sums(model: nn.Module, texts: Sequence[Sequence[int]]) -> mx.array:
    """Return (N, 4, L, E) float32 sums over each text's tokens. Evaluates."""
    num_experts = unit_shape(model).num_units
    passes: list[mx.array] = []
    rows: collections.defaultdict[int, list[mx.array]] = collections.defaultdict(list)

    def observed(inside: Inside) -> nn.Module:
        def observe(position: int, routing: Routing) -> None:
            gates, norms = routing.gates, routing.norms
            is_text = inside.of_next(position, gates.shape[0])[..., None]  # (b, T, 1)
            values = mx.stack([mx.ones_like(gates), gates, norms, gates * norms]) * is_text
            rows[position].append(_by_expert(routing.experts, values, num_experts))
            mx.async_eval(rows[position][-1])  # or a layer's outputs are kept to the end

        return with_observed_experts(model, observe)

    for hidden in read_in_passes(texts, observed):
        passes.append(mx.stack([mx.concatenate(rows[layer]) for layer in sorted(rows)], axis=2))
        mx.eval(hidden, passes)
        rows.clear()
    return mx.concatenate(passes)


def _by_expert(experts: mx.array, values: mx.array, num_experts: int) -> mx.array:
    """Return (b, 4, E): the sums of the (4, b, T, k) values that belong to each expert."""
    num_values, num_rows = values.shape[:2]
    # One axis for rows and experts: each row has experts of its own in it.
    bins = experts + num_experts * mx.arange(num_rows)[:, None, None]
    sums = mx.zeros((num_rows * num_experts, num_values))
    sums = sums.at[bins.reshape(-1)].add(values.reshape(num_values, -1).T)
    return sums.reshape(num_rows, num_experts, num_values).swapaxes(1, 2)
