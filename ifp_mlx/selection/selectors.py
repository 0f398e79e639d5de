"""Selectors: what scores units for an instruction, and what keeps the best of them."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import SelectionError
from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.selection.selection import Pick, Selection
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.selection.statistics import ranks, statistics_of
from ifp_mlx.selection.top_k import top_k_indices
from ifp_mlx.units.kinds import UnitShape
from ifp_mlx.units.modules import family_of, num_groups, unit_shape

DEFAULT_PRIOR_WEIGHT = 0.7
"""Share of the calibrated prior in a rank blend: short prompts carry little evidence of their own.
A choice, not an optimum: ``ifp eval --selector blend:0.5`` measures another."""


class Selector(Protocol):
    """Anything that scores the units of a model for an instruction."""

    def scores(self, texts: Sequence[Sequence[int]]) -> mx.array:
        """Return (N, L, F) float32 scores for the token ids of N instructions; higher = keep."""


@dataclasses.dataclass(frozen=True)
class NamedSelector:
    """A selector, what the user calls it and which units it scores.

    Attributes:
        selector: scores.
        spec: its name.
        kind: the name of the kind of units.
        shape: of the units.
        num_groups: as many units are kept in each of so many groups.
    """

    selector: Selector
    spec: SelectorSpec
    kind: str
    shape: UnitShape
    num_groups: int = 1

    @classmethod
    def of_model(cls, selector: Selector, spec: SelectorSpec, model: nn.Module) -> "NamedSelector":
        """Return a selector that scores the units of a model."""
        return cls(selector, spec, family_of(model).kind.name, unit_shape(model), num_groups(model))


def select(
    named: NamedSelector,
    token_ids: Sequence[int],
    num_kept_units: int,
    examples: Sequence[Sequence[int]] = (),
) -> Selection:
    """Return the ``num_kept_units`` best units a layer for an instruction. Evaluates.

    Args:
        named: scores the units.
        token_ids: the instruction, or a task's description.
        num_kept_units: K.
        examples: token ids of inputs of the task; together they count as much as its description.

    Raises:
        SelectionError: K is out of range, or the scores hold NaN or infinity.
    """
    scores, *of_examples = named.selector.scores([token_ids, *examples])
    if of_examples:
        scores = (scores + mx.stack(of_examples).mean(axis=0)) / 2
    indices = top_k_indices(scores, num_kept_units, named.num_groups)
    is_finite = mx.isfinite(scores).all()
    mx.eval(indices, is_finite)  # together: the host waits for the device once
    if not is_finite.item():
        raise SelectionError(f"selector {str(named.spec)!r} gave scores that are not finite")
    levels = (ranks(scores) * 256).astype(mx.uint8)  # lazy: computed if it is stored or drawn
    pick = Pick(named.kind, named.shape.layers, indices, named.shape.num_units, levels)
    return Selection((pick,), named.spec)


@dataclasses.dataclass(frozen=True)
class StaticSelector:
    """The calibrated prior: the same units for every instruction, or for every one of a task.

    Attributes:
        calibration: where the prior comes from.
        task: the name of a calibrated task; None takes the prior over all text.
    """

    calibration: Calibration
    task: str | None = None

    def scores(self, texts: Sequence[Sequence[int]]) -> mx.array:
        """Return the prior for each; the instructions are not looked at."""
        prior = self.calibration.importance
        if self.task is not None:
            prior = self.calibration.task_importance(self.task)
        return mx.broadcast_to(prior, (len(texts), *prior.shape))


@dataclasses.dataclass(frozen=True)
class PromptSelector:
    """The units that an instruction itself uses in the dense model.

    Attributes:
        model: the dense model.
        criterion: what experts are scored by; None for the ordinary one.
    """

    model: nn.Module
    criterion: str | None = None

    def scores(self, texts: Sequence[Sequence[int]]) -> mx.array:
        """Run the dense model over the instructions once, return their statistics. Evaluates."""
        return statistics_of(self.model).of_instructions(self.model, texts, self.criterion)


@dataclasses.dataclass(frozen=True)
class BlendSelector:
    """A rank blend of what the instruction uses and the calibrated prior.

    Ranks, not values, because the two statistics have no common unit.
    """

    model: nn.Module
    calibration: Calibration
    prior_weight: float = DEFAULT_PRIOR_WEIGHT

    def scores(self, texts: Sequence[Sequence[int]]) -> mx.array:
        """Return ``w * rank(prior) + (1 - w) * rank(prompt)``, ranks in [0, 1). Evaluates."""
        prompt = statistics_of(self.model).of_instructions(self.model, texts)
        prior = ranks(self.calibration.importance)
        return self.prior_weight * prior + (1 - self.prior_weight) * ranks(prompt)


@dataclasses.dataclass(frozen=True)
class PredictorSelector:
    """A trained predictor: reads the instruction and scores every unit of every layer."""

    predictor: SparsityPredictor

    def scores(self, texts: Sequence[Sequence[int]]) -> mx.array:
        """Return the predicted scores, standardised per layer. Lazy."""
        return self.predictor.scores_of(texts)


@dataclasses.dataclass(frozen=True)
class RandomSelector:
    """Random units, the same for every instruction: the control that any selector must beat."""

    shape: UnitShape
    seed: int = 0

    def scores(self, texts: Sequence[Sequence[int]]) -> mx.array:
        """Return uniform noise from the seed, the same for each."""
        size = (len(self.shape.layers), self.shape.num_units)
        noise = mx.random.uniform(shape=size, key=mx.random.key(self.seed))
        return mx.broadcast_to(noise, (len(texts), *size))


def select_random(model: nn.Module, num_kept_units: int, seed: int = 0) -> Selection:
    """Return random units of a model, to try out what does not depend on which. Evaluates."""
    selector = RandomSelector(unit_shape(model), seed)
    named = NamedSelector.of_model(selector, SelectorSpec("random"), model)
    return select(named, (), num_kept_units)
