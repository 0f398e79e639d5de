"""A sub-network: a model ready to answer, and where it came from."""

import dataclasses

import mlx.nn as nn

from ifp_mlx.selection.selection import Selection
from ifp_mlx.selection.spec import SelectorSpec
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
        active_parameters: parameters of ``model``.
        total_parameters: parameters of the dense model.
        from_cache: the selection was read from the cache, nothing was selected.
        reused_task: the description of another cached task whose sub-network serves this one.
        reuse_overlap: share of kept units that the two tasks have in common.
        selection_s: seconds to select, 0 from the cache.
        slicing_s: seconds to slice or load it, 0 when the compact model was still resident.
        weights_from_disk: the compact model was stored by an earlier run, nothing was sliced.
        requantization_error: relative error of quantizing columns of down projections again; 0
            where that was not needed.
    """

    model: nn.Module
    selection: Selection | None
    selector: SelectorSpec
    task: str | None
    kind: UnitKind
    num_kept_units: int
    num_units: int
    active_parameters: int
    total_parameters: int
    from_cache: bool = False
    reused_task: str | None = None
    reuse_overlap: float | None = None
    selection_s: float = 0.0
    slicing_s: float = 0.0
    weights_from_disk: bool = False
    requantization_error: float = 0.0
