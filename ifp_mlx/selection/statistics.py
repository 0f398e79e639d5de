"""What text shows of a model's units when the model reads it, kind by kind."""

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.selection.expert_statistics import ExpertStatistics
from ifp_mlx.selection.ffn_statistics import FfnStatistics
from ifp_mlx.units.modules import family_of

UnitStatistics = FfnStatistics | ExpertStatistics

_OF_KIND: dict[str, type[UnitStatistics]] = {
    "ffn": FfnStatistics,
    "expert": ExpertStatistics,
}


def statistics_of(model: nn.Module) -> type[UnitStatistics]:
    """Return what is measured of the units of a model's kind."""
    return _OF_KIND[family_of(model).kind.name]


def ranks(scores: mx.array) -> mx.array:
    """Return each unit's rank within its layer, scaled to [0, 1): (L, F) float32."""
    order = mx.argsort(mx.argsort(scores, axis=-1), axis=-1)
    return order.astype(mx.float32) / scores.shape[-1]
