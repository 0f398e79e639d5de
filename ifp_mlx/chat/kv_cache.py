"""The keys and values of a conversation, and which tokens they are of."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from ifp_mlx.chat.sampling import KVCacheOptions
from ifp_mlx.errors import UsageError


@dataclasses.dataclass
class KVCache:
    """The KV cache of one sequence of tokens.

    What of it a prompt can use is decided by comparing token ids, so edited or dropped messages
    need no bookkeeping.

    Attributes:
        layers: mlx-lm's cache of each layer.
        token_ids: the tokens that it holds.
    """

    layers: list[Any]
    token_ids: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def empty(cls, model: nn.Module, options: KVCacheOptions) -> "KVCache":
        """Return a cache that holds nothing, of the kind that a model wants.

        Raises:
            UsageError: the model's heads cannot be quantized as the options ask.
        """
        from mlx_lm.models.cache import make_prompt_cache

        _require_quantizable_heads(model, options)
        return cls(make_prompt_cache(model, options.max_kv_size))

    def trim_to(self, prompt_ids: Sequence[int]) -> int | None:
        """Cut the cache to the part that a prompt begins with.

        One token of the prompt is left to compute logits from.

        Returns:
            How many tokens of the prompt it holds; None if it cannot go back so far, as a rotating
            cache or a state, and is of no use for this prompt.
        """
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        common = 0
        for ours, theirs in zip(self.token_ids, prompt_ids, strict=False):
            if ours != theirs:
                break
            common += 1
        common = min(common, len(prompt_ids) - 1)
        surplus = len(self.token_ids) - common
        if surplus and not can_trim_prompt_cache(self.layers):
            return None
        trim_prompt_cache(self.layers, surplus)
        self.token_ids = self.token_ids[:common]
        return common

    def note(self, token_ids: Sequence[int]) -> None:
        """Take note of what was read and written; whatever stopped it, the layers know how far."""
        num_positions = min(layer.offset for layer in self.layers if hasattr(layer, "offset"))
        self.token_ids = list(token_ids[:num_positions])


def _require_quantizable_heads(model: nn.Module, options: KVCacheOptions) -> None:
    args = model.args
    head_dim = getattr(args, "head_dim", None)
    if head_dim is None and hasattr(args, "num_attention_heads"):
        head_dim = args.hidden_size // args.num_attention_heads
    if options.kv_bits is not None and head_dim and head_dim % options.kv_group_size:
        raise UsageError(
            f"`kv_bits` needs heads of a multiple of {options.kv_group_size} values, this model's "
            f"have {head_dim}; leave it out"
        )
