"""Answers to many prompts together, through mlx-lm's batch generation."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.chat.drawing import (
    grammar_for,
    grammar_processors,
    penalty_processors,
    sampler_for,
)
from ifp_mlx.chat.reading import ReadsWithPart
from ifp_mlx.chat.sampling import SamplingOptions

if TYPE_CHECKING:  # mlx-lm takes seconds to import
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_TOGETHER = 32
"""Answers that are written at a time; mlx-lm's own number."""


@dataclasses.dataclass(frozen=True)
class BatchAnswer:
    """One answer of many.

    Attributes:
        index: of the prompt.
        text: the answer.
        token_ids: of the answer, with the one that ends it.
        prompt_tokens: of the prompt.
        finish_reason: ``stop`` or ``length``.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str


def can_batch(model: nn.Module) -> bool:
    """Return whether several conversations with a model can be kept in one KV cache."""
    from mlx_lm.models.cache import make_prompt_cache

    if isinstance(model, ReadsWithPart):  # it tells prompts by their length
        return False
    return all(hasattr(layer, "merge") for layer in make_prompt_cache(model))


def answer_together(
    model: nn.Module,
    tokenizer: "TokenizerWrapper",
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    context_length: int,
    limits: Sequence[int] | None = None,
) -> Iterator[BatchAnswer]:
    """Yield the answers to prompts as they are finished, which need not be their order. Evaluates.

    Greedy answers are those that each prompt gets alone, but for ties that rounding decides: a
    batch multiplies larger matrices.

    Args:
        model: one that ``can_batch``.
        tokenizer: of the model.
        prompts: token ids, each shorter than the context.
        sampling: how tokens are drawn.
        context_length: the most positions; answers end there.
        limits: the most new tokens of each; without them the same number for all.
    """
    from mlx_lm.generate import BatchGenerator

    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    grammar = grammar_for(sampling, tokenizer)
    if limits is None:
        limits = [sampling.max_new_tokens] * len(prompts)
    limits = [
        min(limit, context_length - len(prompt))
        for limit, prompt in zip(limits, prompts, strict=True)
    ]
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        sampler=sampler_for(sampling),
        completion_batch_size=_TOGETHER,
    )
    written: dict[int, list[int]] = {}
    with contextlib.closing(generator):
        uids = generator.insert(
            [list(prompt) for prompt in prompts],
            limits,
            logits_processors=[
                [
                    *penalty_processors(sampling, ()),
                    *grammar_processors(grammar, tokenizer, prompt, limit),
                ]
                for prompt, limit in zip(prompts, limits, strict=True)
            ],
        )
        indices = {uid: index for index, uid in enumerate(uids)}
        while responses := generator.next_generated():
            for response in responses:
                tokens = written.setdefault(response.uid, [])
                tokens.append(response.token)
                if response.finish_reason is not None:
                    del written[response.uid]
                    index = indices[response.uid]
                    num_ends = int(response.finish_reason == "stop")
                    yield BatchAnswer(
                        index,
                        _text(tokenizer, tokens[: len(tokens) - num_ends]),
                        tuple(tokens),
                        len(prompts[index]),
                        response.finish_reason,
                    )


def _text(tokenizer: "TokenizerWrapper", tokens: Sequence[int]) -> str:
    """Return what a single answer's pieces would be together."""
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return str(detokenizer.text)
