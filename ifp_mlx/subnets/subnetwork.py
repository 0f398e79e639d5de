"""A sub-network: a model ready to answer, and where it came from."""

import dataclasses

import mlx.nn as nn

from ifp_mlx.chat.reading import ReadsWithPart
from ifp_mlx.selection.selection import Selection
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import ModelSize
from ifp_mlx.subnets.task_cache import Reuse
from ifp_mlx.units.kinds import UnitKind

DENSE = SelectorSpec("dense")
"""What chose the units of the whole model."""


@dataclasses.dataclass(frozen=True)
class SubNetwork:
    """A model ready to answer, and where it came from.

    Attributes:
        model: the compact model, or the dense one.
        selection: the kept units; None for the dense model.
        selector: what chose them; ``DENSE`` for the dense model.
        task: the description that they were chosen for, if there was one.
        kind: of the units.
        num_kept_units: K.
        num_units: F.
        size: of ``model``.
        source: the size of the dense model.
        from_cache: the selection was read from the cache, nothing was selected.
        reused_task: the description of another cached task whose sub-network serves this one.
        reuse_overlap: share of kept units that the two tasks have in common.
        close_task: another cached task with much the same units, which was not taken.
        selection_s: seconds to select, 0 from the cache.
        slicing_s: seconds to slice or load it, 0 when the compact model was still resident.
        weights_from_disk: the compact model was stored by an earlier run, nothing was sliced.
        reader: a part of ``model`` that reads prompts in its place; None where it reads itself.
        prompt_too_short: the whole model, because selecting a part for this prompt would take
            longer than the part saves.
        requantization_error: relative error of packing weights again; 0 where none were.
    """

    model: nn.Module
    selection: Selection | None
    selector: SelectorSpec
    task: str | None
    kind: UnitKind
    num_kept_units: int
    num_units: int
    size: ModelSize
    source: ModelSize
    from_cache: bool = False
    reused_task: str | None = None
    reuse_overlap: float | None = None
    close_task: Reuse | None = None
    selection_s: float = 0.0
    slicing_s: float = 0.0
    weights_from_disk: bool = False
    requantization_error: float = 0.0
    reader: "SubNetwork | None" = None
    prompt_too_short: bool = False

    @property
    def answering(self) -> nn.Module:
        """What mlx-lm generates with: the model, behind its reader if it has one."""
        if self.reader is None:
            return self.model
        return ReadsWithPart(self.model, self.reader.model)
