"""Where a mixture sends the tokens of its answers, watched at next to no cost."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

_STRIDE = 4  # one token in so many is looked at
_IN_WORK = 2  # steps that mlx may still compute while the next one is built
_MOST_TOKENS = 32  # more are a prompt, which is not an answer
_FADING = 0.9  # what a step's share is worth at the next one


class RoutedTokens:
    """The shares of the latest tokens that went to each expert.

    The experts of a token are part of what is computed for it anyway. They are kept until that has
    been done, so that nothing waits for them.

    Args:
        num_layers: that have experts, L.
        num_experts: of each, K.

    Attributes:
        shares: (L, K) float64, later tokens count more; None before the first.
    """

    def __init__(self, num_layers: int, num_experts: int):
        self.shares: npt.NDArray[np.float64] | None = None
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._num_steps = 0
        self._steps: list[list[mx.array]] = []

    def watch(self, position: int, experts: mx.array) -> None:
        """Take the (..., k) experts that a layer sends tokens to; on the generation thread."""
        if experts.size // experts.shape[-1] > _MOST_TOKENS:
            return
        if position == 0:
            self._num_steps += 1
            if self._num_steps % _STRIDE == 0:
                self._steps.append([])
        if self._num_steps % _STRIDE == 0 and self._steps:
            self._steps[-1].append(experts)
        elif self._steps and self._num_steps % _STRIDE == _IN_WORK and position == 0:
            self._count(self._steps.pop())

    def _count(self, step: list[mx.array]) -> None:
        if len(step) != self._num_layers:  # an answer was left in the middle
            return
        counts = [
            np.bincount(np.asarray(experts).ravel(), minlength=self._num_experts)
            for experts in step
        ]
        former = 0.0 if self.shares is None else self.shares * _FADING
        num_tokens = step[0].size // step[0].shape[-1]
        self.shares = former + np.stack(counts) / num_tokens
