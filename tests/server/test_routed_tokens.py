"""Where tokens go, as the server remembers it."""

import mlx.core as mx
import numpy as np

from ifp_mlx.server.routed_tokens import RoutedTokens


def step(routed: RoutedTokens, *experts: list[int]) -> None:
    """Let a token pass layers that send it to these experts."""
    for position, chosen in enumerate(experts):
        routed.watch(position, mx.array([[chosen]]))


def test_every_fourth_token_is_looked_at_when_it_has_been_computed() -> None:
    routed = RoutedTokens(num_layers=2, num_experts=4)
    for number in range(1, 7):
        assert routed.shares is None
        step(routed, [0, 3] if number == 4 else [1, 1], [2, 3])
    assert routed.shares is not None
    assert routed.shares.tolist() == [[1, 0, 0, 1], [0, 0, 1, 1]]


def test_later_tokens_count_more() -> None:
    routed = RoutedTokens(num_layers=1, num_experts=2)
    for number in range(1, 11):
        step(routed, [0] if number <= 6 else [1])
    assert routed.shares is not None
    np.testing.assert_allclose(routed.shares, [[0.9, 1.0]])


def test_prompts_and_answers_that_broke_off_are_left_out() -> None:
    routed = RoutedTokens(num_layers=2, num_experts=4)
    for _ in range(12):
        routed.watch(0, mx.zeros((1, 33, 2), dtype=mx.int32))
    for _ in range(12):
        routed.watch(0, mx.array([[[0, 1]]]))  # and never another layer
    assert routed.shares is None


def test_tokens_of_a_batch_count_together() -> None:
    routed = RoutedTokens(num_layers=1, num_experts=4)
    for _ in range(6):
        routed.watch(0, mx.array([[[0, 1]], [[0, 2]]]))
    assert routed.shares is not None
    assert routed.shares.tolist() == [[1, 0.5, 0.5, 0]]
