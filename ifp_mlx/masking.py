"""From scores over FFN units to the units that are kept."""

import mlx.core as mx

from ifp_mlx.errors import SelectionError


def top_k_indices(scores: mx.array, num_kept_units: int) -> mx.array:
    """Return the indices of the highest-scoring FFN units of each layer.

    Exactly ``num_kept_units`` are kept in every layer, ties going to the lower index, so that
    equal scores cannot change the compact model's width.

    Args:
        scores: (..., L, F) float, higher = more useful; unbounded; must be finite.
        num_kept_units: K, 1 <= K <= F.

    Returns:
        (..., L, K) int32, ascending within a layer (keeps weight rows in memory order). Lazy.

    Raises:
        SelectionError: K is out of range.

    Source: the Top(lambda, K) of IFPruning (arXiv 2501.02086), section 3; a stable order takes
    the place of a threshold, which keeps more than K units on ties.
    """
    num_units = scores.shape[-1]
    if not 1 <= num_kept_units <= num_units:
        raise SelectionError(f"cannot keep {num_kept_units} of {num_units} FFN units")
    # Not argsort: mlx promises no stable order on its backends, and ties must not depend on one.
    threshold = mx.sort(scores, axis=-1)[..., num_units - num_kept_units, None]  # (..., L, 1)
    above = scores > threshold
    tied = scores == threshold
    wanted_ties = num_kept_units - above.sum(axis=-1, keepdims=True)
    kept = above | (tied & (mx.cumsum(tied.astype(mx.int32), axis=-1) <= wanted_ties))
    positions = mx.where(kept, mx.arange(num_units), num_units)
    return mx.sort(positions, axis=-1)[..., :num_kept_units].astype(mx.int32)


def mask_from_indices(indices: mx.array, num_units: int) -> mx.array:
    """Return the (..., L, F) float32 mask that is 1 at ``indices`` (..., L, K), 0 elsewhere."""
    mask = mx.zeros((*indices.shape[:-1], num_units), dtype=mx.float32)
    return mx.put_along_axis(mask, indices, mx.array(1.0), axis=-1)
