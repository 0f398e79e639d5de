"""One answer: from the ids of a prompt to text, piece by piece, through mlx-lm."""

import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.chat.drawing import (
    grammar_for,
    grammar_processors,
    penalty_processors,
    sampler_for,
)
from ifp_mlx.chat.kv_cache import KVCache
from ifp_mlx.chat.prompt_reading import OnRead, read_ahead
from ifp_mlx.chat.sampling import KVCacheOptions, SamplingOptions

if TYPE_CHECKING:  # mlx-lm takes seconds to import
    from mlx_lm.generate import GenerationResponse
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ifp_mlx.chat.grammar import Grammar


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """What one reply took.

    Attributes:
        prompt_tokens: tokens of the whole prompt.
        cached_prompt_tokens: how many of them were in the KV cache already.
        prompt_tps: prefill speed, tokens a second, over those that were not.
        generated_tokens: tokens of the reply.
        generation_tps: decoding speed, tokens a second.
        time_to_first_token_s: from the call to the first token.
        peak_memory_bytes: highest use of mlx's allocator so far.
        finish_reason: ``stop``, ``length`` or ``interrupted``.
        missing_share: of a mixture's sub-network, the share of gate weight that the whole model
            would have given to experts that are not there; None where nothing is missing.
    """

    prompt_tokens: int
    cached_prompt_tokens: int
    prompt_tps: float
    generated_tokens: int
    generation_tps: float
    time_to_first_token_s: float
    peak_memory_bytes: int
    finish_reason: str
    missing_share: float | None = None


class Answer:
    """The answer to one prompt, generated as it is iterated over.

    However the iteration ends, ``kv_cache`` then holds what was read and written.

    Args:
        model: a compact or dense mlx-lm model.
        tokenizer: of the model.
        prompt_ids: the whole prompt.
        kv_cache: holds a part that the prompt begins with; it grows.
        sampling: how tokens are drawn.
        kv_options: how ``kv_cache`` is kept.
        max_new_tokens: the longest answer.
        on_read: told how much of the prompt is read.

    Attributes:
        stats: what it took so far; None before the first token.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "TokenizerWrapper",
        prompt_ids: Sequence[int],
        kv_cache: KVCache,
        sampling: SamplingOptions,
        kv_options: KVCacheOptions,
        max_new_tokens: int,
        on_read: OnRead | None = None,
    ):
        self.stats: GenerationStats | None = None
        self._model = model
        self._tokenizer = tokenizer
        self._prompt_ids = list(prompt_ids)
        self._kv_cache = kv_cache
        self._sampling = sampling
        self._kv_options = kv_options
        self._max_new_tokens = max_new_tokens
        self._on_read = on_read or (lambda done, total: None)

    def __iter__(self) -> Iterator[str]:
        """Yield the text, piece by piece. Evaluates."""
        if self._sampling.seed is not None:
            mx.random.seed(self._sampling.seed)
        num_cached = len(self._kv_cache.token_ids)
        generated: list[int] = []
        first_token_s = 0.0
        mx.reset_peak_memory()
        new_ids = self._prompt_ids[num_cached:]
        start = time.perf_counter()
        grammar = grammar_for(self._sampling, self._tokenizer)  # refused before anything is read
        try:
            num_read = read_ahead(
                self._model, new_ids, self._kv_cache, self._kv_options, self._on_read
            )
            with contextlib.closing(self._responses(num_cached + num_read, grammar)) as responses:
                for response in responses:
                    if not generated:
                        first_token_s = time.perf_counter() - start
                        self._on_read(len(new_ids), len(new_ids))
                    generated.append(response.token)
                    self.stats = GenerationStats(
                        prompt_tokens=len(self._prompt_ids),
                        cached_prompt_tokens=num_cached,
                        prompt_tps=len(new_ids) / first_token_s,
                        generated_tokens=len(generated),
                        generation_tps=response.generation_tps,
                        time_to_first_token_s=first_token_s,
                        peak_memory_bytes=mx.get_peak_memory(),
                        finish_reason=response.finish_reason or "interrupted",
                    )
                    if response.text:
                        yield response.text
        finally:
            self._kv_cache.note(self._prompt_ids + generated)

    def _responses(
        self, num_read: int, grammar: "Grammar | None"
    ) -> "Generator[GenerationResponse, None, None]":
        from mlx_lm.generate import stream_generate

        kv_options = self._kv_options
        return stream_generate(
            self._model,
            self._tokenizer,
            self._prompt_ids[num_read:],
            max_tokens=self._max_new_tokens,
            sampler=sampler_for(self._sampling),
            logits_processors=[
                *penalty_processors(self._sampling, self._prompt_ids[:num_read]),
                *grammar_processors(
                    grammar, self._tokenizer, self._prompt_ids, self._max_new_tokens
                ),
            ],
            prompt_cache=self._kv_cache.layers,
            kv_bits=kv_options.kv_bits,
            kv_group_size=kv_options.kv_group_size,
            quantized_kv_start=kv_options.quantized_kv_start,
        )
