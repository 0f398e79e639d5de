"""Amounts of units: rounding, bounds and what the user is told."""

from collections.abc import Callable
from typing import Any

import pytest

from ifp_mlx.errors import UsageError
from ifp_mlx.units.amounts import Amounts
from ifp_mlx.units.model_config import ModelConfig

ConfigFactory = Callable[..., dict[str, Any]]


def of_ffn(num_units: int) -> Amounts:
    return Amounts(num_units, 64, 64, "FFN units")


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
    assert of_ffn(num_units).nearest(keep_ratio) == expected


@pytest.mark.parametrize("keep_ratio", [0.0, -0.5, 1.01, float("nan")])
def test_ratio_out_of_range_is_refused(keep_ratio: float) -> None:
    with pytest.raises(UsageError, match="`keep_ratio` must be above 0 and at most 1"):
        of_ffn(1536).nearest(keep_ratio)


@pytest.mark.parametrize("num_kept_units", [64, 1024, 1000])
def test_multiples_of_64_and_f_itself_are_taken(num_kept_units: int) -> None:
    num_units = 1000 if num_kept_units == 1000 else 1536
    assert of_ffn(num_units).check(num_kept_units) == num_kept_units


@pytest.mark.parametrize(
    ("num_kept_units", "message"),
    [
        (0, "between 64 and 1536 FFN units, not 0"),
        (-64, "between 64 and 1536 FFN units, not -64"),
        (1600, "between 64 and 1536 FFN units, not 1600"),
        (1000, "nearest to 1000: 960 or 1024"),
        (5, "between 64 and 1536 FFN units, not 5"),
    ],
)
def test_other_amounts_are_refused_with_what_would_do(num_kept_units: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        of_ffn(1536).check(num_kept_units)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, (64, 64)),
        ("qwen3_moe", {"num_experts_per_tok": 3}, (1, 3)),
        ("ernie4_5_moe", {"moe_k": 5}, (1, 5)),
        ("deepseek_v3", {}, (2, 4)),  # two groups, each scored by its best two
        ("deepseek_v3", {"num_experts_per_tok": 3}, (2, 6)),  # all three from one group
        ("deepseek_v3", {"num_experts_per_tok": 3, "topk_group": 2}, (2, 4)),
    ],
)
def test_a_router_needs_enough_experts_to_choose_from(
    tiny_config: ConfigFactory, family: str, changes: dict[str, Any], expected: tuple[int, int]
) -> None:
    config = ModelConfig.parse(tiny_config(family, **changes), "config.json")
    amounts = Amounts.of(config, 8 if family != "llama" else 192)
    assert (amounts.multiple, amounts.least) == expected


def test_amounts_go_down_to_the_least() -> None:
    assert Amounts(8, 2, 4, "experts").descending() == [8, 6, 4]
    assert Amounts(150, 64, 64, "FFN units").descending() == [150, 128, 64]
    assert Amounts(8, 2, 4, "experts").nearest(0.1) == 4
    with pytest.raises(UsageError, match="between 4 and 8 experts, not 2"):
        Amounts(8, 2, 4, "experts").check(2)
