"""Whether a part of the model that a prompt selects for itself is worth selecting.

It is wherever reading the prompt with the part saves more than selecting and slicing cost: the
answer is then sooner there whatever its length, which nobody knows in advance. All costs are
multiply-adds in the layers; what they take on a machine cancels out.
"""

from ifp_mlx.units.model_config import ModelConfig

SLICING_TOKENS = 512
"""Slicing takes as long as reading so many tokens, at most: 7 to 10 ms on an H100 that reads 2 to 4
tokens of an 8B model in 0.1 ms (docs/latency.md); slower machines slice sooner than they read."""


def selecting_pays(
    config: ModelConfig,
    num_units: int,
    num_kept_units: int,
    *,
    prompt_tokens: int,
    tokens_read: int,
) -> bool:
    """Return whether an answer comes sooner with a part that is selected first.

    Args:
        config: of the model.
        num_units: F.
        num_kept_units: K.
        prompt_tokens: of the prompt.
        tokens_read: of them, how many the whole model reads to select.
    """
    if config.family.kind.router is not None:
        return False  # as many experts see a token in the part as in the whole
    unit = len(config.family.kind.parts) * config.hidden_size
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layer = config.hidden_size * heads + num_units * unit
    scores = 2 * config.num_attention_heads * config.head_dim  # for each earlier token
    saved = prompt_tokens * (num_units - num_kept_units) * unit
    spent = (tokens_read + SLICING_TOKENS) * layer + tokens_read**2 * scores // 2
    return saved > spent
