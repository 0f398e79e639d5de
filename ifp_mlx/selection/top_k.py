"""From scores over units to the units that are kept: exactly, and softly for training.

Training multiplies unit activations by a mask. In the forward pass the mask is hard (exactly K
ones a layer); its gradient is that of a *soft* top-k, a mask in [0, 1] that sums to K.
"""

import math
from typing import cast

import mlx.core as mx

from ifp_mlx.errors import SelectionError

_BISECTIONS = 40
"""Halvings of the threshold's bracket: past float32's resolution for standardised scores."""

# HardConcrete's stretch: a gate's distribution covers (LOW, HIGH) before it is cut to [0, 1], so
# that exact zeros and ones have positive probability. Louizos et al. 2018 (arXiv 1712.01312).
_STRETCH_LOW = -0.1
_STRETCH_HIGH = 1.1
_CONCRETE_TEMPERATURE = 2.0 / 3.0


def top_k_mask(scores: mx.array, num_kept_units: int) -> mx.array:
    """Return the mask that is 1 at the highest-scoring units of each layer and 0 elsewhere.

    Exactly ``num_kept_units`` are kept in every layer, ties going to the lower index, so that
    equal scores cannot change the compact model's width.

    Args:
        scores: (..., L, F) float, higher = more useful; unbounded; must be finite.
        num_kept_units: K, 1 <= K <= F.

    Returns:
        (..., L, F) float32. Lazy.

    Raises:
        SelectionError: K is out of range.
    """
    return _kept(scores, num_kept_units).astype(mx.float32)


def top_k_indices(scores: mx.array, num_kept_units: int, num_groups: int = 1) -> mx.array:
    """Return the indices of the highest-scoring units of each layer.

    Exactly ``num_kept_units`` are kept in every layer, ties going to the lower index, so that
    equal scores cannot change the compact model's width.

    Args:
        scores: (..., L, F) float, higher = more useful; unbounded; must be finite.
        num_kept_units: K, 1 <= K <= F.
        num_groups: as many units are kept of each of so many groups, which lie one after another.

    Returns:
        (..., L, K) int32, ascending within a layer (keeps weight rows in memory order). Lazy.

    Raises:
        SelectionError: K is out of range, or no multiple of the number of groups.

    Source: the Top(lambda, K) of IFPruning (arXiv 2501.02086), section 3; a stable order takes
    the place of a threshold, which keeps more than K units on ties.
    """
    if num_kept_units % num_groups:
        raise SelectionError(f"cannot keep {num_kept_units} units of {num_groups} groups alike")
    grouped = mx.unflatten(scores, -1, (num_groups, -1))
    kept = _kept(grouped, num_kept_units // num_groups).flatten(-2)
    num_units = scores.shape[-1]
    positions = mx.where(kept, mx.arange(num_units), num_units)
    return mx.sort(positions, axis=-1)[..., :num_kept_units].astype(mx.int32)


def mask_from_indices(indices: mx.array, num_units: int) -> mx.array:
    """Return the (..., L, F) float32 mask that is 1 at ``indices`` (..., L, K), 0 elsewhere."""
    mask = mx.zeros((*indices.shape[:-1], num_units), dtype=mx.float32)
    return mx.put_along_axis(mask, indices, mx.array(1.0), axis=-1)


def standardised(scores: mx.array) -> mx.array:
    """Return scores with mean 0 and standard deviation 1 in each layer: (..., L, F) float32."""
    scores = scores.astype(mx.float32)
    centred = scores - scores.mean(axis=-1, keepdims=True)
    return centred * mx.rsqrt(centred.square().mean(axis=-1, keepdims=True) + 1e-12)


def soft_top_k(scores: mx.array, num_kept_units: int, eps: float) -> mx.array:
    """Return the soft mask ``sigmoid((scores - t) / eps)`` whose t makes each layer sum to K.

    The maximiser of ``scores . m + eps * H_b(m)`` under ``sum(m) = K``, ``0 <= m <= 1``, where
    H_b is the entropy of independent bits. t is found by bisection; the gradient is the implicit
    one, so that the bisection itself is not differentiated.

    Args:
        scores: (..., F) float32.
        num_kept_units: K, 1 <= K < F.
        eps: temperature > 0 in the scores' unit; towards 0 the mask becomes hard.

    Returns:
        (..., F) float32 in (0, 1). Lazy; differentiable in ``scores``.

    Raises:
        SelectionError: K or eps is out of range.
    """
    _check_soft(scores, num_kept_units, eps)

    @mx.custom_function
    def relaxed(scores: mx.array) -> mx.array:
        # At the bracket's ends every unit is nearly out, or nearly in.
        low = scores.min(axis=-1, keepdims=True) - 20.0 * eps
        high = scores.max(axis=-1, keepdims=True) + 20.0 * eps
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            too_many = mx.sigmoid((scores - middle) / eps).sum(-1, keepdims=True) > num_kept_units
            low = mx.where(too_many, middle, low)
            high = mx.where(too_many, high, middle)
        return mx.sigmoid((scores - 0.5 * (low + high)) / eps)

    @relaxed.vjp
    def relaxed_vjp(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        # Moving score j moves t too: dm_i/dz_j = s_i (delta_ij - s_j / sum(s)) / eps, s = m (1-m).
        slope = output * (1.0 - output)
        total = mx.maximum(slope.sum(axis=-1, keepdims=True), 1e-20)
        mean = (slope * cotangent).sum(axis=-1, keepdims=True) / total
        return slope * (cotangent - mean) / eps

    return cast(mx.array, relaxed(scores.astype(mx.float32)))


def straight_through(hard: mx.array, soft: mx.array) -> mx.array:
    """Return ``hard`` in the forward pass with the gradient of ``soft``."""
    return mx.stop_gradient(hard - soft) + soft


def hard_concrete(scores: mx.array, uniform: mx.array) -> mx.array:
    """Return HardConcrete gates: stretched, cut samples of the binary Concrete distribution.

    Args:
        scores: (..., F) float32 log-odds of a gate being open.
        uniform: noise in (0, 1), of the scores' shape; 0.5 everywhere gives the median gate.

    Returns:
        (..., F) float32 in [0, 1]. Differentiable in ``scores``.

    Source: Louizos et al. 2018 (arXiv 1712.01312), section 2.2; IFPruning names it as the
    alternative to SoftTopK.
    """
    noise = mx.log(uniform) - mx.log1p(-uniform)
    concrete = mx.sigmoid((noise + scores) / _CONCRETE_TEMPERATURE)
    return mx.clip(concrete * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW, 0.0, 1.0)


def hard_concrete_l0(scores: mx.array) -> mx.array:
    """Return the probability that each HardConcrete gate is not zero: (..., F) in (0, 1).

    Its sum over units is the expected number of open gates: the L0 loss drives it to K.
    """
    shift = _CONCRETE_TEMPERATURE * math.log(-_STRETCH_LOW / _STRETCH_HIGH)
    return mx.sigmoid(scores - shift)


def _kept(scores: mx.array, num_kept_units: int) -> mx.array:
    """Return the (..., L, F) boolean mask of exactly K units a layer."""
    num_units = scores.shape[-1]
    if not 1 <= num_kept_units <= num_units:
        raise SelectionError(f"cannot keep {num_kept_units} of {num_units} units")
    # Not argsort: mlx promises no stable order on its backends, and ties must not depend on one.
    threshold = mx.sort(scores, axis=-1)[..., num_units - num_kept_units, None]  # (..., L, 1)
    above = scores > threshold
    tied = scores == threshold
    wanted_ties = num_kept_units - above.astype(mx.int32).sum(axis=-1, keepdims=True)
    return above | (tied & (mx.cumsum(tied.astype(mx.int32), axis=-1) <= wanted_ties))


def _check_soft(scores: mx.array, num_kept_units: int, eps: float) -> None:
    if not 1 <= num_kept_units < scores.shape[-1]:
        raise SelectionError(
            f"a soft mask cannot keep {num_kept_units} of {scores.shape[-1]} FFN units"
        )
    if not eps > 0:
        raise SelectionError(f"eps must be positive, not {eps}")
