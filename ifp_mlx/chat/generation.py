"""One answer: from the ids of a prompt to text, piece by piece, through mlx-lm."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.chat.kv_cache import KVCache
from ifp_mlx.chat.sampling import PENALTY_CONTEXT_SIZE, KVCacheOptions, SamplingOptions

if TYPE_CHECKING:  # mlx-lm takes seconds to import
    from mlx_lm.generate import GenerationResponse
    from mlx_lm.tokenizer_utils import TokenizerWrapper

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


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
    ):
        self.stats: GenerationStats | None = None
        self._model = model
        self._tokenizer = tokenizer
        self._prompt_ids = list(prompt_ids)
        self._kv_cache = kv_cache
        self._sampling = sampling
        self._kv_options = kv_options
        self._max_new_tokens = max_new_tokens

    def __iter__(self) -> Iterator[str]:
        """Yield the text, piece by piece. Evaluates."""
        if self._sampling.seed is not None:
            mx.random.seed(self._sampling.seed)
        num_cached = len(self._kv_cache.token_ids)
        generated: list[int] = []
        first_token_s = 0.0
        mx.reset_peak_memory()
        start = time.perf_counter()
        responses = self._responses(num_cached)
        try:
            with contextlib.closing(responses):
                for response in responses:
                    if not generated:
                        first_token_s = time.perf_counter() - start
                    generated.append(response.token)
                    self.stats = GenerationStats(
                        prompt_tokens=len(self._prompt_ids),
                        cached_prompt_tokens=num_cached,
                        prompt_tps=response.prompt_tps,
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

    def _responses(self, num_cached: int) -> "Generator[GenerationResponse, None, None]":
        from mlx_lm.generate import stream_generate
        from mlx_lm.sample_utils import make_sampler

        sampling, kv_options = self._sampling, self._kv_options
        return stream_generate(
            self._model,
            self._tokenizer,
            self._prompt_ids[num_cached:],
            max_tokens=self._max_new_tokens,
            sampler=make_sampler(
                sampling.temperature,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                top_k=sampling.top_k,
            ),
            logits_processors=[
                *_logits_processors(sampling, self._prompt_ids[:num_cached]),
                *self._grammar_processors(),
            ],
            prompt_cache=self._kv_cache.layers,
            kv_bits=kv_options.kv_bits,
            kv_group_size=kv_options.kv_group_size,
            quantized_kv_start=kv_options.quantized_kv_start,
        )

    def _grammar_processors(self) -> list[LogitsProcessor]:
        """Return what makes the answer fit the schema; what a model thinks before it is free."""
        if self._sampling.schema is None:
            return []
        from ifp_mlx.chat.grammar import Grammars

        tokenizer, begins_after = self._tokenizer, ()
        if tokenizer.has_thinking:
            opened = tokenizer.rfind_think_start(self._prompt_ids)
            if opened > tokenizer.rfind_think_end(self._prompt_ids):
                begins_after = tokenizer.think_end_tokens
        grammar = Grammars(tokenizer).for_schema(self._sampling.schema)
        return [grammar.processor(self._max_new_tokens, begins_after)]


def _logits_processors(
    sampling: SamplingOptions, cached_ids: Sequence[int]
) -> list[LogitsProcessor]:
    """Return mlx-lm's processors for these options, none if no option needs one.

    mlx-lm shows them the tokens that it was given, not what the KV cache holds already. That is put
    in front, so that it does not change the words.
    """
    from mlx_lm.sample_utils import make_logits_processors

    processors = make_logits_processors(
        repetition_penalty=sampling.repetition_penalty,
        repetition_context_size=PENALTY_CONTEXT_SIZE,
    )
    unseen = mx.array(list(cached_ids[-PENALTY_CONTEXT_SIZE:]), mx.uint32)

    def with_unseen(process: LogitsProcessor) -> LogitsProcessor:
        return lambda tokens, logits: process(mx.concatenate([unseen, tokens]), logits)

    return [with_unseen(process) for process in processors]
