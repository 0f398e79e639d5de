import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.errors import SelectionError
from ifp_mlx.selection.selection import Pick, Selection
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.selection.task_tree import overlap_matrix, task_tree

OVERLAPS = np.array(
    [
        [1.0, 0.2, 0.9, 0.3, 0.1],
        [0.2, 1.0, 0.4, 0.8, 0.1],
        [0.9, 0.4, 1.0, 0.1, 0.1],
        [0.3, 0.8, 0.1, 1.0, 0.1],
        [0.1, 0.1, 0.1, 0.1, 1.0],
    ]
)


def selection(*rows: list[int]) -> Selection:
    pick = Pick("ffn", tuple(range(len(rows))), mx.array(rows, dtype=mx.int32), 8)
    return Selection((pick,), SelectorSpec("static"))


def test_overlap_matrix_counts_shared_units() -> None:
    one, two = selection([0, 1, 2], [1, 2, 3]), selection([0, 1, 7], [4, 5, 6])
    matrix = overlap_matrix([one, two, one])
    third = (2 / 3 + 0) / 2
    np.testing.assert_allclose(matrix, [[1, third, 1], [third, 1, third], [1, third, 1]], rtol=1e-6)


def test_overlap_matrix_refuses_models_of_other_shape() -> None:
    with pytest.raises(SelectionError, match="one shape"):
        overlap_matrix([selection([0, 1]), selection([0, 1], [0, 1])])


def test_task_tree_joins_what_has_most_in_common_first() -> None:
    tree = task_tree(OVERLAPS)
    assert sorted(tree.members) == [0, 1, 2, 3, 4]
    assert tree.overlap == pytest.approx(0.1)
    pairs, single = tree.parts
    assert single.members == (4,)
    assert pairs.overlap == pytest.approx((0.2 + 0.3 + 0.4 + 0.1) / 4)
    assert {tuple(sorted(part.members)) for part in pairs.parts} == {(0, 2), (1, 3)}


@pytest.mark.parametrize(
    ("threshold", "groups"),
    [
        (1.0, [{0}, {2}, {1}, {3}, {4}]),
        (0.85, [{0, 2}, {1}, {3}, {4}]),
        (0.5, [{0, 2}, {1, 3}, {4}]),
        (0.2, [{0, 1, 2, 3}, {4}]),
        (0.0, [{0, 1, 2, 3, 4}]),
    ],
)
def test_task_tree_splits_at_the_threshold(threshold: float, groups: list[set[int]]) -> None:
    found = [set(group.members) for group in task_tree(OVERLAPS).split(threshold)]
    assert sorted(found, key=sorted) == sorted(groups, key=sorted)


def test_task_tree_of_one_task_is_a_leaf() -> None:
    tree = task_tree(np.eye(1))
    assert (tree.members, tree.parts) == ((0,), ())


def test_task_tree_equals_a_plain_average_linkage() -> None:
    generator = np.random.default_rng(4)
    noise = generator.uniform(0, 1, (9, 9))
    overlaps = (noise + noise.T) / 2
    clusters: list[set[int]] = [{n} for n in range(9)]
    heights = []
    while len(clusters) > 1:
        height, one, other = max(
            (float(np.mean([overlaps[i, j] for i in a for j in b])), x, y)
            for x, a in enumerate(clusters)
            for y, b in enumerate(clusters)
            if x < y
        )
        heights.append(height)
        clusters[one] |= clusters[other]
        del clusters[other]

    def overlaps_of(group) -> list[float]:  # type: ignore[no-untyped-def]
        below = [value for part in group.parts for value in overlaps_of(part)]
        return [*below, group.overlap] if group.parts else below

    assert sorted(overlaps_of(task_tree(overlaps))) == pytest.approx(sorted(heights))
