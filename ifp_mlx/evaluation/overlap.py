"""Overlap analysis: how much the sub-networks of different inputs have in common."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ifp_mlx.errors import UsageError
from ifp_mlx.evaluation.controls import UnitMasks

Figures = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Mean overlap of pairs of sub-networks, by layer and pair of domains.

    The overlap of two sub-networks is the number of units that both keep, over K.

    Attributes:
        domains: M names.
        by_layer: (L, M, M), the mean over all pairs of different inputs, one of each domain.
        num_inputs: inputs of each domain.
        chance: K / F, the overlap of random sub-networks.
    """

    domains: tuple[str, ...]
    by_layer: Figures
    num_inputs: tuple[int, ...]
    chance: float

    @property
    def within(self) -> Figures:
        """(L,) the mean over domains of the overlap within a domain."""
        figures: Figures = np.diagonal(self.by_layer, axis1=1, axis2=2).mean(axis=-1)
        return figures

    @property
    def between(self) -> Figures:
        """(L,) the mean over pairs of different domains; NaN for one domain."""
        rows, columns = np.triu_indices(len(self.domains), k=1)
        if not rows.size:
            return np.full(len(self.by_layer), np.nan)
        figures: Figures = self.by_layer[:, rows, columns].mean(axis=-1)
        return figures

    def above_chance(self, overlap: Figures) -> Figures:
        """Return overlaps on a scale where random masks are 0 and identical ones are 1."""
        return (overlap - self.chance) / (1.0 - self.chance)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        layers = [
            {
                "layer": layer,
                "within": float(self.within[layer]),
                "between": None if np.isnan(self.between[layer]) else float(self.between[layer]),
                "matrix": matrix.tolist(),
            }
            for layer, matrix in enumerate(self.by_layer)
        ]
        return {
            "domains": list(self.domains),
            "num_inputs": list(self.num_inputs),
            "chance": self.chance,
            "layers": layers,
            "mean": {
                "within": float(self.within.mean()),
                "between": None if len(self.domains) == 1 else float(self.between.mean()),
                "matrix": self.by_layer.mean(axis=0).tolist(),
            },
        }


def overlap(masks: UnitMasks) -> Overlap:
    """Return the overlap analysis of the masks of inputs of several domains.

    Raises:
        UsageError: a domain has fewer than two inputs, or every unit is kept.

    Source: the analysis of IFPruning (arXiv 2501.02086): shared kept units / K, the mean over
    all pairs.
    """
    by_domain: dict[str, list[int]] = {}
    for index, example in enumerate(masks.examples):
        by_domain.setdefault(example.domain, []).append(index)
    for domain, members in by_domain.items():
        if len(members) < 2:
            raise UsageError(f"overlap needs two inputs of each domain; {domain} has one")
    num_kept, num_units = int(masks.kept[0, 0].sum()), masks.kept.shape[-1]
    if num_kept == num_units:
        raise UsageError("every unit is kept: sub-networks cannot differ; choose a smaller K")
    layers = [
        _domain_means(masks.kept[:, layer], num_kept, by_domain)
        for layer in range(masks.kept.shape[1])
    ]
    return Overlap(
        domains=tuple(by_domain),
        by_layer=np.stack(layers),
        num_inputs=tuple(map(len, by_domain.values())),
        chance=num_kept / num_units,
    )


def _domain_means(
    kept: npt.NDArray[np.bool_], num_kept: int, by_domain: Mapping[str, Sequence[int]]
) -> Figures:
    """Return the (M, M) mean overlaps of one layer's (E, F) masks."""
    values = kept.astype(np.float32)
    pairs = values @ values.T / num_kept  # (E, F) @ (F, E) contracts the units
    means = np.zeros((len(by_domain), len(by_domain)))
    groups = list(by_domain.values())
    for row, one in enumerate(groups):
        for column, other in enumerate(groups):
            block = pairs[np.ix_(one, other)].astype(np.float64)
            if row == column:  # an input's overlap with itself says nothing
                size = len(one)
                means[row, column] = (block.sum() - np.trace(block)) / (size * (size - 1))
            else:
                means[row, column] = block.mean()
    return means
