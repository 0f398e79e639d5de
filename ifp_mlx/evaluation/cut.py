"""How well a model predicts text with a part of its units, chosen for each text.

FFN units are masked, so that texts with different units are read together. Experts are not: which
others take a token's place is the router's choice. There each selection is cut once, and reads its
own texts.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.evaluation.controls import UnitMasks
from ifp_mlx.evaluation.quality import HeldOutExample, Quality, evaluate
from ifp_mlx.selection.selection import Pick, Selection
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.units.masks import with_unit_masks
from ifp_mlx.units.modules import family_of, unit_shape


def compact_model(dense: nn.Module, masks: UnitMasks, example: HeldOutExample) -> nn.Module:
    """Return the model of the units that one example keeps. Evaluates."""
    shape, kind = unit_shape(dense), family_of(dense).kind.name
    pick = Pick(kind, shape.layers, masks.indices_of(example), shape.num_units)
    compact = slice_model(dense, Selection((pick,), SelectorSpec("masks")))
    mx.eval(compact.parameters())
    return compact


def evaluate_cut(
    dense: nn.Module,
    masks: UnitMasks | None,
    examples: Sequence[HeldOutExample],
    reference: nn.Module | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    selected_by: Callable[[HeldOutExample], HeldOutExample] = lambda example: example,
) -> dict[str, Quality]:
    """Return the quality of a model with a part of its units, by domain. Evaluates.

    Args:
        dense: the whole model.
        masks: which units; None for all.
        examples: of any domains.
        reference: as for ``evaluate``.
        progress: called with (examples done, all).
        selected_by: from an example to the one whose mask it takes.
    """
    if masks is None:
        return evaluate(dense, examples, lambda batch: None, reference, progress)
    if family_of(dense).kind.columns is not None:
        return evaluate(
            with_unit_masks(dense),
            examples,
            lambda batch: masks([selected_by(example) for example in batch]),
            reference,
            progress,
        )
    alike: dict[bytes, list[HeldOutExample]] = {}
    for example in examples:
        alike.setdefault(masks.of(selected_by(example)).tobytes(), []).append(example)
    measured, done = [], 0
    for group in alike.values():
        compact = compact_model(dense, masks, selected_by(group[0]))
        measured.append(evaluate(compact, group, lambda batch: None, reference))
        done += len(group)
        progress(done, len(examples))
    domains = sorted({domain for qualities in measured for domain in qualities})
    return {
        domain: Quality.of_all([one[domain] for one in measured if domain in one])
        for domain in domains
    }
