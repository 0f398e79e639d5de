"""Which units a sub-network keeps, as arrays that can be counted, compared and drawn."""

import dataclasses

import numpy as np
import numpy.typing as npt

from ifp_mlx.errors import SelectionError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.units.kinds import UnitShape

Shares = npt.NDArray[np.float64]
_STEPS = 255  # of a rank


@dataclasses.dataclass(frozen=True)
class UnitMap:
    """The units of a model, and which of them a sub-network keeps.

    Attributes:
        kind: the name of the kind of units.
        layers: indices of the decoder layers that have such units, ascending.
        kept: (L, F) bool.
        scores: (L, F) float64, where each unit's score stands in its layer, from 0 to 1; None
            where that is not known.
    """

    kind: str
    layers: tuple[int, ...]
    kept: npt.NDArray[np.bool_]
    scores: Shares | None = None

    @classmethod
    def of(cls, selection: Selection) -> "UnitMap":
        """Return the map of a selection. Evaluates."""
        pick = selection.pick
        kept = np.zeros((len(pick.layers), pick.num_units), dtype=np.bool_)
        np.put_along_axis(kept, np.asarray(pick.indices), True, axis=1)
        scores = None if pick.ranks is None else np.asarray(pick.ranks) / _STEPS
        return cls(pick.kind, pick.layers, kept, scores)

    @classmethod
    def whole(cls, kind: str, shape: UnitShape) -> "UnitMap":
        """Return the map of a whole model."""
        return cls(kind, shape.layers, np.ones((len(shape.layers), shape.num_units), np.bool_))

    def scored(self, values: Shares) -> "UnitMap":
        """Return the map with other scores.

        Args:
            values: (L, K), at least 0, of the kept units in their order; in each layer they are
                scaled so that the highest is 1.
        """
        scores = np.zeros(self.kept.shape)
        scores[self.kept] = (values / values.max(axis=1, keepdims=True).clip(1e-9)).ravel()
        return dataclasses.replace(self, scores=scores)

    @property
    def num_kept_units(self) -> int:
        """K."""
        return int(self.kept[0].sum())

    @property
    def num_units(self) -> int:
        """F."""
        return int(self.kept.shape[1])

    @property
    def chance(self) -> float:
        """K / F: the share of any units that as many random ones would hit."""
        return self.num_kept_units / self.num_units

    def shared(self, other: "UnitMap") -> npt.NDArray[np.int64]:
        """Return how many units of each layer both keep, (L,).

        Raises:
            SelectionError: the two are of models of different shape.
        """
        if (self.kind, self.layers, self.num_units) != (other.kind, other.layers, other.num_units):
            raise SelectionError("only sub-networks of models of one shape can be compared")
        counts: npt.NDArray[np.int64] = (self.kept & other.kept).sum(axis=1)
        return counts

    def overlap(self, other: "UnitMap") -> float:
        """Return the share of units in common, of the smaller one's; the mean over layers.

        Raises:
            SelectionError: the two are of models of different shape.
        """
        smaller = min(self.num_kept_units, other.num_kept_units)
        return float(self.shared(other).mean() / smaller)


def binned(values: npt.NDArray[np.generic], num_columns: int) -> Shares:
    """Return (L, C) means of (L, F) values over C columns, each of neighbouring units.

    Args:
        values: numbers or truth values.
        num_columns: at most; C is F where that is smaller.
    """
    num_units = values.shape[1]
    edges = np.linspace(0, num_units, min(num_columns, num_units) + 1).round().astype(int)
    means: Shares = np.add.reduceat(values.astype(np.float64), edges[:-1], axis=1) / np.diff(edges)
    return means
