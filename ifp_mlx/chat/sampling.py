"""How tokens are drawn, and how keys and values are kept: options, checked."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ifp_mlx.errors import UsageError

PENALTY_CONTEXT_SIZE = 20
"""Tokens that penalties look back at, of the prompt as well; mlx-lm's default."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn. Names and defaults follow mlx-lm.

    Attributes:
        max_new_tokens: the longest reply, in tokens.
        temperature: 0 takes the most likely token each time.
        top_p: nucleus sampling; 0 or 1 turns it off.
        top_k: draw among this many; 0 turns it off.
        min_p: smallest share of the top token's probability; 0 turns it off.
        repetition_penalty: above 1 makes the latest tokens less likely; None turns it off.
        seed: makes drawing repeatable; None draws anew each time.
        schema: a JSON schema that the reply must fit; None for any text.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"`max_new_tokens` must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise UsageError(f"`temperature` must be 0 or more, not {self.temperature:g}")
        if not 0 <= self.top_p <= 1:
            raise UsageError(f"`top_p` must be between 0 and 1, not {self.top_p:g}")
        penalty = self.repetition_penalty
        if penalty is not None and not 0 < penalty < math.inf:
            raise UsageError(f"`repetition_penalty` must be a number above 0, not {penalty:g}")


@dataclasses.dataclass(frozen=True)
class KVCacheOptions:
    """How keys and values are kept, as mlx-lm offers it.

    Attributes:
        max_kv_size: keep only this many positions (rotating); None keeps all.
        kv_bits: quantize keys and values to this many bits; None does not.
        kv_group_size: quantization group.
        quantized_kv_start: positions before quantization begins.
    """

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
