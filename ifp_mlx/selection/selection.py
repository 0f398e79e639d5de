"""Which FFN units to keep: selectors turn an instruction into a Selection."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import SelectionError
from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.masks import mask_from_indices, top_k_indices
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.storage.arrays import load_arrays, save_arrays
from ifp_mlx.units import ffn

DEFAULT_PRIOR_WEIGHT = 0.7
"""Share of the calibrated prior in a rank blend: short prompts carry little evidence of their own.
A choice, not an optimum: benchmarks/selection_quality.py --selectors blend:0.5 measures another."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The FFN units that a sub-network keeps.

    Attributes:
        indices: (L, K) int32, ascending and unique within a layer, each in [0, F).
        num_units: F of the dense model.
        selector: the name of what chose them.
        mask_values: (L, K) float32 factors of the kept units, for adapters that end training
            with soft masks; None means 1.
    """

    indices: mx.array
    num_units: int
    selector: str
    mask_values: mx.array | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.indices.shape[0])

    @property
    def num_kept_units(self) -> int:
        """K."""
        return int(self.indices.shape[1])

    def units(self, layer: int) -> mx.array:
        """Return the (K,) kept units of a layer. Lazy, and a view.

        A slice, because mlx does what ``indices[layer]`` says with a gather: on an accelerator
        one more kernel a layer, a quarter of all that slicing launches.
        """
        return self.indices[layer : layer + 1].squeeze(0)

    def validate(self, model: nn.Module | None = None) -> "Selection":
        """Return self after checking everything that ``mx.take`` does not.

        Args:
            model: the dense model that the selection is meant for, if it is at hand.

        Raises:
            SelectionError: wrong rank or dtype, out of range, unsorted, repeated, or made for a
                model of another shape.
        """
        indices = self.indices
        if indices.ndim != 2 or indices.dtype != mx.int32 or 0 in indices.shape:
            raise SelectionError(
                f"a selection is (layers, units) int32, not {indices.shape} {indices.dtype}"
            )
        if ((indices < 0) | (indices >= self.num_units)).any().item():
            raise SelectionError(f"a selected unit is outside 0..{self.num_units - 1}")
        if self.num_kept_units > 1 and (indices[:, 1:] <= indices[:, :-1]).any().item():
            raise SelectionError("selected units must be ascending and unique in each layer")
        if self.mask_values is not None and self.mask_values.shape != indices.shape:
            raise SelectionError(
                f"mask values are {self.mask_values.shape}, indices are {indices.shape}"
            )
        if model is not None:
            shape = (len(ffn.ffn_modules(model)), ffn.num_units(model))
            if (self.num_layers, self.num_units) != shape:
                raise SelectionError(
                    f"the selection is for {self.num_layers} layers of {self.num_units} units, "
                    f"the model has {shape[0]} of {shape[1]}"
                )
        return self

    def mask(self) -> mx.array:
        """Return the (L, F) float32 mask of the kept units."""
        return mask_from_indices(self.indices, self.num_units)

    def overlap(self, other: "Selection") -> mx.array:
        """Return the (L,) share of kept units that both have: shared / K of the smaller one.

        Raises:
            SelectionError: the two are for models of different shape.
        """
        if (self.num_layers, self.num_units) != (other.num_layers, other.num_units):
            raise SelectionError("only selections of models of one shape can be compared")
        shared = (self.mask() * other.mask()).sum(axis=-1)
        return shared / min(self.num_kept_units, other.num_kept_units)

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file, whole or not at all; ``metadata`` goes into its header."""
        arrays = {"indices": self.indices}
        if self.mask_values is not None:
            arrays["mask_values"] = self.mask_values
        header = {**(metadata or {}), "num_units": str(self.num_units), "selector": self.selector}
        save_arrays(path, arrays, header)

    @classmethod
    def load(cls, path: Path) -> tuple["Selection", dict[str, str]]:
        """Return a selection and the metadata it was saved with, validated.

        Raises:
            SelectionError: the file is damaged or is no selection.
        """
        try:
            arrays, metadata = load_arrays(path)
            selection = cls(
                indices=arrays["indices"],
                num_units=int(metadata["num_units"]),
                selector=metadata["selector"],
                mask_values=arrays.get("mask_values"),
            )
        except (ValueError, KeyError) as error:
            raise SelectionError(f"{path} is not a selection file: {error}") from error
        return selection.validate(), metadata


class Selector(Protocol):
    """Anything that scores FFN units for an instruction.

    ``name`` and ``version`` go into cache keys: a selector whose scores change takes a new version.
    """

    @property
    def name(self) -> str:
        """What the user calls it."""

    @property
    def version(self) -> str:
        """Changes whenever the same input may give other scores."""

    def scores(self, token_ids: Sequence[int]) -> mx.array:
        """Return (L, F) float32 scores for an instruction's token ids; higher = keep."""


def select(
    selector: Selector,
    token_ids: Sequence[int],
    num_kept_units: int,
    examples: Sequence[Sequence[int]] = (),
) -> Selection:
    """Return the ``num_kept_units`` best units a layer for an instruction. Evaluates.

    Args:
        selector: scores the units.
        token_ids: the instruction, or a task's description.
        num_kept_units: K.
        examples: token ids of inputs of the task; together they count as much as its description.

    Raises:
        SelectionError: K is out of range, or the scores hold NaN or infinity.
    """
    scores = selector.scores(token_ids)
    if examples:
        total = mx.zeros_like(scores)
        for example in examples:
            total = total + selector.scores(example)
            mx.eval(total)  # one example's activations at a time
        scores = (scores + total / len(examples)) / 2
    indices, is_finite = top_k_indices(scores, num_kept_units), mx.isfinite(scores).all()
    mx.eval(indices, is_finite)  # together: the host waits for the device once
    if not is_finite.item():
        raise SelectionError(f"selector {selector.name!r} gave scores that are not finite")
    return Selection(
        indices=indices,
        num_units=int(scores.shape[-1]),
        selector=selector.name,
    )


@dataclasses.dataclass(frozen=True)
class StaticSelector:
    """The calibrated prior: the same units for every instruction, or for every one of a task.

    Attributes:
        calibration: where the prior comes from.
        task: the name of a calibrated task; None takes the prior over all text.
    """

    calibration: Calibration
    task: str | None = None
    version: str = "1"

    @property
    def name(self) -> str:
        """``static``, or ``static:TASK``."""
        return "static" if self.task is None else f"static:{self.task}"

    def scores(self, token_ids: Sequence[int]) -> mx.array:
        """Return the prior; the instruction is not looked at."""
        if self.task is None:
            return self.calibration.importance
        return self.calibration.task_importance(self.task)


@dataclasses.dataclass(frozen=True)
class PromptSelector:
    """The units that an instruction itself activates in the dense model.

    Source: GRIFFIN (Dong et al. 2024, arXiv 2404.01365): each token's activations normalised to
    unit length, a unit's score the L2 norm over the tokens.
    """

    model: nn.Module
    name: str = "prompt"
    version: str = "1"

    def scores(self, token_ids: Sequence[int]) -> mx.array:
        """Run the dense model over the instruction once and return its statistic. Evaluates."""
        rows: list[mx.array] = []

        def observe(activations: mx.array) -> None:
            units = activations[0].astype(mx.float32)  # (T, F)
            length = mx.linalg.norm(units, axis=-1, keepdims=True)
            rows.append(mx.linalg.norm(units / mx.maximum(length, 1e-12), axis=0))  # over T
            mx.async_eval(rows[-1])  # so that a layer's activations are not kept to the end

        observed = ffn.with_wrapped_down(
            self.model, lambda _, down: ffn.ObservedDown(down, observe)
        )
        # The trunk alone: the vocabulary's logits are of no use here.
        hidden = observed.model(mx.array([list(token_ids)]), None)
        mx.eval(hidden, rows)
        return mx.stack(rows)  # (L, F)


@dataclasses.dataclass(frozen=True)
class BlendSelector:
    """A rank blend of what the instruction activates and the calibrated prior.

    Ranks, not values, because the two statistics have no common unit.
    """

    model: nn.Module
    calibration: Calibration
    prior_weight: float = DEFAULT_PRIOR_WEIGHT
    name: str = "blend"

    @property
    def version(self) -> str:
        """Holds the weight, which changes the scores."""
        return f"1-{self.prior_weight:g}"

    def scores(self, token_ids: Sequence[int]) -> mx.array:
        """Return ``w * rank(prior) + (1 - w) * rank(prompt)``, ranks in [0, 1). Evaluates."""
        prompt = ranks(PromptSelector(self.model).scores(token_ids))
        prior = ranks(self.calibration.importance)
        return self.prior_weight * prior + (1 - self.prior_weight) * prompt


@dataclasses.dataclass(frozen=True)
class PredictorSelector:
    """A trained predictor: reads the instruction and scores every unit of every layer.

    Attributes:
        predictor: of an IFP adapter; its version changes with its weights.
    """

    predictor: SparsityPredictor
    name: str = "predictor"

    @property
    def version(self) -> str:
        """The predictor's own."""
        return self.predictor.version

    def scores(self, token_ids: Sequence[int]) -> mx.array:
        """Return the predicted scores, standardised per layer. Lazy."""
        return self.predictor.scores_of(token_ids)


@dataclasses.dataclass(frozen=True)
class RandomSelector:
    """Random units, the same for every instruction: the control that any selector must beat."""

    num_layers: int
    num_units: int
    seed: int = 0
    name: str = "random"

    @property
    def version(self) -> str:
        """Holds the seed."""
        return f"1-{self.seed}"

    def scores(self, token_ids: Sequence[int]) -> mx.array:
        """Return uniform noise from the seed."""
        return mx.random.uniform(
            shape=(self.num_layers, self.num_units), key=mx.random.key(self.seed)
        )


def ranks(scores: mx.array) -> mx.array:
    """Return each unit's rank within its layer, scaled to [0, 1): (L, F) float32."""
    order = mx.argsort(mx.argsort(scores, axis=-1), axis=-1)
    return order.astype(mx.float32) / scores.shape[-1]
