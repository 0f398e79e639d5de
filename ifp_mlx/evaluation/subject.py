"""A model under measurement, with everything that rows of a table can be made from."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.nn as nn

from ifp_mlx.chat.chat_template import ChatTokenizer, chat_ids
from ifp_mlx.errors import UsageError
from ifp_mlx.evaluation.controls import Instruction, UnitMasks, unit_masks
from ifp_mlx.evaluation.cut import compact_model
from ifp_mlx.evaluation.quality import DOCUMENT_PREFIX, HeldOutExample
from ifp_mlx.evaluation.rows import Row
from ifp_mlx.selection.selectors import NamedSelector
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.subnets.selectors import SELECTORS, SelectorFiles, make_selector
from ifp_mlx.units.masks import with_unit_masks
from ifp_mlx.units.modules import unit_shape

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
        files: what selectors are made from.
        adapted_model: the base model with the adapter's changes, if there is an adapter.
        task_descriptions: domain -> the description that selects for it, for ``+task`` rows.
    """

    model: nn.Module
    tokenizer: ChatTokenizer
    files: SelectorFiles = dataclasses.field(default_factory=SelectorFiles)
    adapted_model: nn.Module | None = None
    task_descriptions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, assistant: "Assistant", task_descriptions: Mapping[str, str]) -> "Subject":
        """Return what an assistant answers with, to be measured."""
        model, files = assistant.dense().model, assistant.files.for_selectors
        return cls(
            model=model,
            tokenizer=assistant.tokenizer,
            files=files,
            adapted_model=None if files.adapter is None else files.adapter.apply(model),
            task_descriptions=task_descriptions,
        )

    @property
    def num_units(self) -> int:
        """F."""
        return unit_shape(self.model).num_units

    def check(self, row: Row, domains: Iterable[str] = ()) -> None:
        """Refuse a row that cannot be measured here, before anything is.

        Raises:
            UsageError: it needs a calibration, an adapter or a description that is not there.
        """
        needs = "calibration" if row.selector == "domain" else None
        if row.selector in SELECTORS:
            needs = SELECTORS[row.selector].needs
        if needs == "calibration" and self.files.calibration is None:
            raise UsageError(f"row {row.label!r} needs a calibration; ifp calibrate makes one")
        if needs == "adapter" and self.files.predictor_fingerprint is None:
            raise UsageError(f"row {row.label!r} needs an adapter with a predictor: `adapter`")
        if row.adapted and self.adapted_model is None:
            raise UsageError(f"row {row.label!r} needs an adapter: `adapter`")
        if row.per_task:
            missing = sorted(set(domains) - set(self.task_descriptions))
            if missing:
                raise UsageError(
                    f"row {row.label!r} needs a task description of {', '.join(missing)}: "
                    "`tasks`, JSON from domain to description"
                )
        if row.selector in ("static", "random"):
            self._selector(row)  # an unknown task is refused now

    def dense_model(self, row: Row) -> nn.Module:
        """Return the dense model whose units a row chooses from."""
        if not row.adapted:
            return self.model
        if self.adapted_model is None:
            raise UsageError(f"row {row.label!r} needs an adapter: `adapter`")
        return self.adapted_model

    def masked_model(self, row: Row) -> nn.Module:
        """Return the model that the row's masks are set on."""
        return with_unit_masks(self.dense_model(row))

    def compact_model(
        self, row: Row, masks: UnitMasks | None, example: HeldOutExample
    ) -> nn.Module:
        """Return the sliced model that a row gives one example. Evaluates."""
        dense = self.dense_model(row)
        if masks is None:
            return dense
        return compact_model(dense, masks, example)

    def masks(
        self,
        rows: Sequence[Row],
        examples: Sequence[HeldOutExample],
        progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> dict[Row, UnitMasks | None]:
        """Return the masks of each row, None for dense ones. Evaluates.

        Rows that differ in K, control or weights share their selector's scores.
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
        named = self._selector(row)
        if row.per_task:
            descriptions = {
                domain: tuple(chat_ids(self.tokenizer, [{"role": "user", "content": text}]))
                for domain, text in self.task_descriptions.items()
            }
            return lambda example: (named, descriptions[example.domain])
        if row.reads_input:
            return lambda example: (named, example.prompt_ids)
        return lambda example: (named, ())

    def _domain_prior(self, example: HeldOutExample) -> Instruction:
        assert self.files.calibration is not None
        task = example.domain.removeprefix(DOCUMENT_PREFIX)
        known = task if task in self.files.calibration.tasks else None
        return make_selector(SelectorSpec("static", known), self.model, self.files), ()

    def _selector(self, row: Row) -> NamedSelector:
        return make_selector(SelectorSpec(row.selector, row.argument), self.model, self.files)
