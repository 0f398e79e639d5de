"""Amounts of FFN units, checked and rounded in one place."""

from ifp_mlx.errors import UsageError

UNIT_MULTIPLE = 64
"""The command line keeps multiples of this: the widest quantization group that mlx uses by default,
so that a compact model can be quantized without padding."""


def round_keep_ratio(keep_ratio: float, num_units: int) -> int:
    """Return K: ``keep_ratio`` of ``num_units``, rounded to the nearest multiple of 64.

    A ratio of 1 keeps every unit, whatever F is; a small one keeps at least 64.

    Raises:
        UsageError: the ratio is not in (0, 1].
    """
    if not 0.0 < keep_ratio <= 1.0:
        raise UsageError(f"--keep must be above 0 and at most 1, not {keep_ratio:g}")
    if keep_ratio == 1.0:
        return num_units
    rounded = round(keep_ratio * num_units / UNIT_MULTIPLE) * UNIT_MULTIPLE
    return min(max(rounded, UNIT_MULTIPLE), num_units)


def check_keep_units(num_kept_units: int, num_units: int) -> int:
    """Return ``num_kept_units`` if it is a multiple of 64 up to F, or F itself.

    Raises:
        UsageError: with the nearest allowed amounts.
    """
    if num_kept_units == num_units:
        return num_kept_units
    if not 1 <= num_kept_units <= num_units:
        raise UsageError(
            f"--keep-units must be between {UNIT_MULTIPLE} and {num_units}, not {num_kept_units}"
        )
    if num_kept_units % UNIT_MULTIPLE:
        below = num_kept_units // UNIT_MULTIPLE * UNIT_MULTIPLE
        nearest = [k for k in (below, below + UNIT_MULTIPLE) if 0 < k <= num_units]
        raise UsageError(
            f"--keep-units must be a multiple of {UNIT_MULTIPLE} or {num_units}; "
            f"nearest to {num_kept_units}: {' or '.join(map(str, nearest))}"
        )
    return num_kept_units
