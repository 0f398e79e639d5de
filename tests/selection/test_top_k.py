"""Hard and soft top-k against NumPy and finite differences."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifp_mlx.errors import SelectionError
from ifp_mlx.selection.top_k import (
    hard_concrete,
    hard_concrete_l0,
    mask_from_indices,
    soft_top_k,
    standardised,
    straight_through,
    top_k_indices,
    top_k_mask,
)


def soft_top_k_coda(scores: np.ndarray, keep: int, eps: float) -> np.ndarray:
    """The soft mask of CoDA (Lei et al. 2023, arXiv 2304.04947): a softmax of sum K, cut at 1."""
    cap = np.zeros_like(scores)
    for _ in range(400):
        total = np.exp((scores + cap) / eps).sum(-1, keepdims=True)
        level = eps * np.log(keep) - eps * np.log(total)
        cap = np.minimum(-scores - level, 0.0)
    mask: np.ndarray = np.minimum(np.exp((scores + cap + level) / eps), 1.0)
    return mask


# Central differences in float32: the step's rounding error over the step.
_GRADIENT_TOLERANCE = 2e-2


@given(
    st.lists(st.integers(-3, 3), min_size=5, max_size=23),
    st.integers(1, 5),
)
def test_top_k_keeps_exactly_k_on_ties(values: list[int], keep: int) -> None:
    scores = mx.array([values], dtype=mx.float32)
    indices = np.array(top_k_indices(scores, keep))[0]
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert indices.tolist() == sorted(order[:keep])
    mask = np.array(top_k_mask(scores, keep))[0]
    assert np.flatnonzero(mask).tolist() == indices.tolist()


def test_mask_from_indices_inverts_top_k() -> None:
    scores = mx.random.normal((2, 3, 29))
    assert mx.array_equal(mask_from_indices(top_k_indices(scores, 7), 29), top_k_mask(scores, 7))


@pytest.mark.parametrize("keep", [0, 24])
def test_top_k_refuses_k_out_of_range(keep: int) -> None:
    with pytest.raises(SelectionError, match=f"cannot keep {keep} of 23"):
        top_k_mask(mx.zeros((2, 23)), keep)


@pytest.mark.parametrize("eps", [1.0, 0.3, 0.05])
def test_soft_top_k_solves_its_equation(eps: float) -> None:
    scores = np.random.default_rng(0).normal(size=(3, 29)).astype(np.float32)
    mask = np.array(soft_top_k(mx.array(scores), 7, eps))
    assert np.allclose(mask.sum(axis=-1), 7.0, atol=1e-3)
    # One threshold a row explains every value, where float32 can still tell it from 0 or 1.
    for row, values in zip(mask, scores, strict=True):
        inner = (row > 1e-3) & (row < 1 - 1e-3)
        thresholds = values[inner] - eps * np.log(row[inner] / (1 - row[inner]))
        assert np.ptp(thresholds) < 1e-2


@pytest.mark.parametrize(("eps", "tolerance"), [(0.1, 0.3), (0.02, 0.1)])
def test_soft_top_k_comes_near_codas_as_both_sharpen(eps: float, tolerance: float) -> None:
    scores = np.random.default_rng(1).normal(size=(2, 23))
    ours = np.array(soft_top_k(mx.array(scores.astype(np.float32)), 6, eps))
    theirs = soft_top_k_coda(scores, 6, eps)
    assert np.allclose(theirs.sum(-1), 6, atol=1e-2)
    # The same constraints under another entropy, which matters less the smaller its weight.
    assert np.abs(ours - theirs).max() < tolerance


def test_soft_gradients_match_finite_differences() -> None:
    scores = mx.random.normal((2, 19), key=mx.random.key(3))
    weight = mx.random.normal((2, 19), key=mx.random.key(4))

    def total(values: mx.array) -> mx.array:
        total: mx.array = (soft_top_k(values, 5, 0.7) * weight).sum()
        return total

    found = mx.grad(total)(scores)
    step = 1e-2
    for unit in range(0, 19, 3):
        direction = mx.zeros((2, 19))
        direction[:, unit] = step
        difference = (total(scores + direction) - total(scores - direction)).item() / (2 * step)
        assert found[:, unit].sum().item() == pytest.approx(difference, abs=_GRADIENT_TOLERANCE)


def test_soft_top_k_approaches_the_hard_mask() -> None:
    scores = mx.random.normal((4, 23))
    assert mx.allclose(soft_top_k(scores, 5, 1e-3), top_k_mask(scores, 5), atol=0.2)


@pytest.mark.parametrize(("keep", "eps", "reason"), [(23, 0.5, "soft mask"), (5, 0.0, "eps")])
def test_soft_top_k_refuses_what_has_no_soft_mask(keep: int, eps: float, reason: str) -> None:
    with pytest.raises(SelectionError, match=reason):
        soft_top_k(mx.zeros((2, 23)), keep, eps)


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    scores = mx.random.normal((2, 23))

    def total(values: mx.array) -> mx.array:
        mask = straight_through(top_k_mask(values, 5), soft_top_k(values, 5, 0.5))
        return (mask * mx.arange(23)).sum()

    hard = (top_k_mask(scores, 5) * mx.arange(23)).sum()
    assert total(scores).item() == pytest.approx(hard.item(), rel=1e-5)
    soft = mx.grad(lambda values: (soft_top_k(values, 5, 0.5) * mx.arange(23)).sum())(scores)
    assert mx.allclose(mx.grad(total)(scores), soft, atol=1e-4)


def test_hard_concrete_opens_as_often_as_its_l0_says() -> None:
    scores = mx.array([-2.0, 0.0, 1.5])
    noise = mx.random.uniform(1e-4, 1 - 1e-4, (20000, 3), key=mx.random.key(5))
    gates = hard_concrete(scores, noise)
    assert gates.min().item() == 0.0
    assert gates.max().item() == 1.0
    opened = (gates > 0).astype(mx.float32).mean(axis=0)
    # 20000 draws: three standard deviations are about 0.01.
    assert mx.allclose(opened, hard_concrete_l0(scores), atol=0.015)


def test_standardised_has_mean_zero_and_unit_deviation_per_layer() -> None:
    result = np.array(standardised(3.0 + 5.0 * mx.random.normal((2, 3, 50))))
    assert np.allclose(result.mean(-1), 0.0, atol=1e-5)
    assert np.allclose(result.std(-1), 1.0, atol=1e-4)
