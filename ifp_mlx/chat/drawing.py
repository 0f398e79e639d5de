"""From sampling options to what mlx-lm draws tokens with: a sampler and processors of logits."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from ifp_mlx.chat.sampling import PENALTY_CONTEXT_SIZE, SamplingOptions

if TYPE_CHECKING:  # mlx-lm takes seconds to import
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ifp_mlx.chat.grammar import Grammar

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def sampler_for(sampling: SamplingOptions) -> Sampler:
    """Return mlx-lm's sampler for these options."""
    from mlx_lm.sample_utils import make_sampler

    sampler: Sampler = make_sampler(
        sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_k=sampling.top_k,
    )
    return sampler


def grammar_for(sampling: SamplingOptions, tokenizer: "TokenizerWrapper") -> "Grammar | None":
    """Return the grammar of the options' schema, made once for all answers; None without one.

    Raises:
        UsageError: no answer can fit the schema, or it cannot be enforced.
    """
    if sampling.schema is None:
        return None
    from ifp_mlx.chat.grammar import Grammars

    return Grammars(tokenizer).for_schema(sampling.schema)


def grammar_processors(
    grammar: "Grammar | None",
    tokenizer: "TokenizerWrapper",
    prompt_ids: Sequence[int],
    max_new_tokens: int,
) -> list[LogitsProcessor]:
    """Return what makes one answer fit a grammar; what a model thinks before it is free."""
    if grammar is None:
        return []
    begins_after: Sequence[int] = ()
    if tokenizer.has_thinking:
        opened = tokenizer.rfind_think_start(prompt_ids)
        if opened > tokenizer.rfind_think_end(prompt_ids):
            begins_after = tokenizer.think_end_tokens
    return [grammar.processor(max_new_tokens, begins_after)]


def penalty_processors(
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
