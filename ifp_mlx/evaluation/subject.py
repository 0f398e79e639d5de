"""A model under measurement, with everything that rows of a table can be made from."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import UsageError
from ifp_mlx.evaluation.controls import (
    Instruction,
    UnitMasks,
    unit_masks,
    with_compensated_masks,
)
from ifp_mlx.evaluation.quality import DOCUMENT_PREFIX, HeldOutExample
from ifp_mlx.evaluation.rows import Row
from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.selection.selection import (
    DEFAULT_PRIOR_WEIGHT,
    BlendSelector,
    PredictorSelector,
    PromptSelector,
    RandomSelector,
    Selector,
    StaticSelector,
)
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.text.examples import ChatTokenizer, chat_ids
from ifp_mlx.units import ffn

if TYPE_CHECKING:
    from ifp_mlx.assistant import Assistant


TASK_DESCRIPTIONS = Path(__file__).parents[1] / "data" / "task_descriptions.json"
"""One sentence a domain, written by hand; shipped with the package."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What rows measure.

    Attributes:
        model: the dense base model.
        tokenizer: of the model.
        calibration: the calibrated prior, if there is one.
        predictor: an adapter's, if there is one.
        adapted_model: the base model with the adapter's changes, if there is an adapter.
        task_descriptions: domain -> the description that selects for it, for ``+task`` rows.
    """

    model: nn.Module
    tokenizer: ChatTokenizer
    calibration: Calibration | None = None
    predictor: SparsityPredictor | None = None
    adapted_model: nn.Module | None = None
    task_descriptions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, assistant: "Assistant", task_descriptions: Mapping[str, str]) -> "Subject":
        """Return what an assistant answers with, to be measured."""
        model = assistant.dense().model
        adapter = assistant.adapter
        return cls(
            model=model,
            tokenizer=assistant.tokenizer,
            calibration=assistant.calibration,
            predictor=(
                adapter.predictor(model) if adapter is not None and adapter.has_predictor else None
            ),
            adapted_model=None if adapter is None else adapter.apply(model),
            task_descriptions=task_descriptions,
        )

    @property
    def num_units(self) -> int:
        """F."""
        return ffn.num_units(self.model)

    def check(self, row: Row, domains: Iterable[str] = ()) -> None:
        """Refuse a row that cannot be measured here, before anything is.

        Raises:
            UsageError: it needs a calibration, an adapter or a description that is not there.
        """
        needs_calibration = row.compensate or row.selector in ("static", "domain", "blend")
        if needs_calibration and self.calibration is None:
            raise UsageError(f"row {row.label!r} needs a calibration; ifp calibrate makes one")
        if row.selector == "predictor" and self.predictor is None:
            raise UsageError(f"row {row.label!r} needs an adapter with a predictor: --adapter DIR")
        if row.adapted and self.adapted_model is None:
            raise UsageError(f"row {row.label!r} needs an adapter: --adapter DIR")
        if row.per_task:
            missing = sorted(set(domains) - set(self.task_descriptions))
            if missing:
                raise UsageError(
                    f"row {row.label!r} needs a task description of {', '.join(missing)}: "
                    "--tasks FILE, JSON from domain to description"
                )
        if row.selector in ("static", "random"):
            self._selector(row).scores(())  # an unknown task is refused now

    def dense_model(self, row: Row) -> nn.Module:
        """Return the dense model whose units a row chooses from."""
        if not row.adapted:
            return self.model
        if self.adapted_model is None:
            raise UsageError(f"row {row.label!r} needs an adapter: --adapter DIR")
        return self.adapted_model

    def masked_model(self, row: Row) -> nn.Module:
        """Return the model that the row's masks are set on."""
        dense = self.dense_model(row)
        if row.compensate and self.calibration is not None:
            return with_compensated_masks(dense, self.calibration)
        return ffn.with_unit_masks(dense)

    def compact_model(
        self, row: Row, masks: UnitMasks | None, example: HeldOutExample
    ) -> nn.Module:
        """Return the sliced model that a row gives one example. Evaluates."""
        dense = self.dense_model(row)
        if masks is None:
            return dense
        compensation = self.calibration if row.compensate else None
        selection = masks.selection(example, row.name)
        compact = slice_model(dense, selection, compensation=compensation)
        mx.eval(compact.parameters())
        return compact

    def masks(
        self,
        rows: Sequence[Row],
        examples: Sequence[HeldOutExample],
        progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> dict[Row, UnitMasks | None]:
        """Return the masks of each row, None for dense ones. Evaluates.

        Rows that differ in K, control, compensation or weights share their selector's scores.
        """
        kinds: dict[tuple[str, str | None, bool], list[Row]] = {}
        result: dict[Row, UnitMasks | None] = {}
        for row in rows:
            if row.selector == "dense":
                result[row] = None
            else:
                kinds.setdefault((row.selector, row.argument, row.per_task), []).append(row)
        for alike in kinds.values():
            name = f"selecting {alike[0].selector}"
            by_amount = unit_masks(
                examples,
                self._instruction(alike[0]),
                [row.num_kept_units for row in alike],
                lambda done, total, name=name: progress(name, done, total),  # type: ignore[misc]
            )
            for row in alike:
                masks = by_amount[row.num_kept_units]
                if row.control == "fixed":
                    masks = masks.fixed()
                elif row.control == "shuffled":
                    masks = masks.shuffled()
                result[row] = masks
        return {row: result[row] for row in rows}

    def _instruction(self, row: Row) -> Callable[[HeldOutExample], Instruction]:
        """Return what selects for an example in this row."""
        if row.selector == "domain":
            return self._domain_prior
        selector = self._selector(row)
        if row.per_task:
            descriptions = {
                domain: tuple(chat_ids(self.tokenizer, [{"role": "user", "content": text}]))
                for domain, text in self.task_descriptions.items()
            }
            return lambda example: (selector, descriptions[example.domain])
        if row.reads_input:
            return lambda example: (selector, example.prompt_ids)
        return lambda example: (selector, ())

    def _domain_prior(self, example: HeldOutExample) -> Instruction:
        assert self.calibration is not None
        task = example.domain.removeprefix(DOCUMENT_PREFIX)
        known = task if task in self.calibration.tasks else None
        return StaticSelector(self.calibration, known), ()

    def _selector(self, row: Row) -> Selector:
        if row.selector == "prompt":
            return PromptSelector(self.model)
        if row.selector == "random":
            layers = len(ffn.ffn_modules(self.model))
            return RandomSelector(layers, self.num_units, seed=int(row.argument or 0))
        if row.selector == "predictor" and self.predictor is not None:
            return PredictorSelector(self.predictor)
        assert self.calibration is not None
        if row.selector == "static":
            return StaticSelector(self.calibration, row.argument)
        weight = DEFAULT_PRIOR_WEIGHT if row.argument is None else float(row.argument)
        return BlendSelector(self.model, self.calibration, weight)
