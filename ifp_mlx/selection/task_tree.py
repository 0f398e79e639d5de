"""Groups of tasks: descriptions whose sub-networks keep much the same units."""

import dataclasses
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifp_mlx.selection.selection import Selection

Overlaps = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class TaskGroup:
    """A node of the tree of tasks.

    Attributes:
        members: indices of the tasks below, in the order of the leaves.
        overlap: mean overlap between its two parts' tasks; 1 for a single task.
        parts: the two groups that were joined; none for a single task.
    """

    members: tuple[int, ...]
    overlap: float = 1.0
    parts: tuple["TaskGroup", ...] = ()

    def split(self, threshold: float) -> Iterator["TaskGroup"]:
        """Yield the largest groups below whose parts overlap by at least ``threshold``."""
        if self.overlap >= threshold:
            yield self
            return
        for part in self.parts:
            yield from part.split(threshold)


def overlap_matrix(selections: Sequence[Selection]) -> Overlaps:
    """Return (N, N): the share of units in common, mean over layers. Evaluates.

    Raises:
        SelectionError: the selections are for models of different shape.
    """
    matrix = np.eye(len(selections))
    for row, one in enumerate(selections):
        shared = [one.overlap(other).mean() for other in selections[:row]]
        if shared:
            matrix[row, :row] = matrix[:row, row] = np.array(mx.stack(shared))
    return matrix


def task_tree(overlaps: Overlaps) -> TaskGroup:
    """Return the tree that joins, again and again, the two groups with the most in common.

    Args:
        overlaps: (N, N) symmetric, N >= 1.

    Source: average linkage (UPGMA; Sokal and Michener 1958), with overlap for similarity.
    """
    groups = [TaskGroup((index,)) for index in range(len(overlaps))]
    while len(groups) > 1:
        pairs = [
            (_mean_overlap(overlaps, one, other), -first, -second)
            for first, one in enumerate(groups)
            for second, other in enumerate(groups[:first])
        ]
        overlap, first, second = max(pairs)  # ties: the earliest pair
        one, other = groups[-second], groups[-first]
        joined = TaskGroup((*one.members, *other.members), overlap, (one, other))
        groups = [group for group in groups if group not in (one, other)]
        groups.insert(-second, joined)
    return groups[0]


def _mean_overlap(overlaps: Overlaps, one: TaskGroup, other: TaskGroup) -> float:
    return float(overlaps[np.ix_(one.members, other.members)].mean())
