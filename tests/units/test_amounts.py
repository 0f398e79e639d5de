"""Amounts of units: rounding, bounds and what the user is told."""

import pytest

from ifp_mlx.errors import UsageError
from ifp_mlx.units.amounts import check_keep_units, round_keep_ratio


@pytest.mark.parametrize(
    ("keep_ratio", "num_units", "expected"),
    [
        (0.67, 1536, 1024),
        (0.5, 1536, 768),
        (0.67, 4864, 3264),
        (1.0, 1000, 1000),
        (0.001, 1536, 64),
        (0.999, 1000, 1000),
    ],
)
def test_ratio_is_rounded_to_a_multiple_of_64(
    keep_ratio: float, num_units: int, expected: int
) -> None:
    assert round_keep_ratio(keep_ratio, num_units) == expected


@pytest.mark.parametrize("keep_ratio", [0.0, -0.5, 1.01, float("nan")])
def test_ratio_out_of_range_is_refused(keep_ratio: float) -> None:
    with pytest.raises(UsageError, match="--keep must be above 0 and at most 1"):
        round_keep_ratio(keep_ratio, 1536)


@pytest.mark.parametrize("num_kept_units", [64, 1024, 1000])
def test_multiples_of_64_and_f_itself_are_taken(num_kept_units: int) -> None:
    num_units = 1000 if num_kept_units == 1000 else 1536
    assert check_keep_units(num_kept_units, num_units) == num_kept_units


@pytest.mark.parametrize(
    ("num_kept_units", "message"),
    [
        (0, "between 64 and 1536, not 0"),
        (-64, "between 64 and 1536, not -64"),
        (1600, "between 64 and 1536, not 1600"),
        (1000, "nearest to 1000: 960 or 1024"),
        (5, "nearest to 5: 64"),
    ],
)
def test_other_amounts_are_refused_with_what_would_do(num_kept_units: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_keep_units(num_kept_units, 1536)
