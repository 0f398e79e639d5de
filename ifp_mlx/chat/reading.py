"""Reading with a part of a model, writing with the whole of it.

Three quarters of the time to the first token is arithmetic in the FFNs of the prompt's tokens. Both
models have the same attention, so the keys and values that a part leaves behind serve the whole.
It costs little cross-entropy and more of what an answer gets right (docs/reading.md): measure it.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

TAIL_TOKENS = 64
"""The last tokens of a short prompt are read by the whole model: the answer leans on them most."""

LONGEST_WITH_TAIL = 2048
"""Tokens of a prompt that is short in this sense. In a longer one a question that the whole model
has read finds facts that the part has read less often than one that the part has read, too."""


class ReadsWithPart(nn.Module):
    """Two models behind one interface: a part reads prompts, the whole goes on from there.

    mlx-lm hands a model the pieces of a prompt, and then one token at a time; that is how the two
    are told apart, wherever a model is used.

    Args:
        writer: the whole mlx-lm model.
        reader: a compact model of it, not changed by an adapter.
        tail_tokens: so many of a piece's last tokens are read by the whole model, if the piece is
            not longer than ``LONGEST_WITH_TAIL``.
    """

    def __init__(self, writer: nn.Module, reader: nn.Module, tail_tokens: int = TAIL_TOKENS):
        super().__init__()
        self.writer = writer
        self.reader = reader
        self.tail_tokens = tail_tokens
        if hasattr(writer, "make_cache"):
            self.make_cache = writer.make_cache

    def tail_of(self, num_tokens: int) -> int:
        """Return how many last tokens of a prompt the whole model reads, but for the very last."""
        return 0 if num_tokens > LONGEST_WITH_TAIL else self.tail_tokens

    def __call__(self, inputs: mx.array, cache: Any = None, **options: Any) -> mx.array:
        """Return the logits of (B, T) token ids: of the tail, or of all if the part reads all."""
        logits: mx.array
        num_read = inputs.shape[1] - self.tail_of(inputs.shape[1])
        if num_read > 0:
            logits = self.reader(inputs[:, :num_read], cache=cache, **options)
            inputs = inputs[:, num_read:]
        if inputs.shape[1] > 0:
            logits = self.writer(inputs, cache=cache, **options)
        return logits

    @property
    def layers(self) -> list[nn.Module]:
        """The whole model's decoder layers."""
        layers: list[nn.Module] = self.writer.layers
        return layers

    @property
    def args(self) -> Any:
        """The whole model's settings."""
        return self.writer.args
