"""Greedy answers to many prompts, together where the model can.

A step of decoding waits for the weights; it takes hardly longer for several answers than for one.
"""

from collections.abc import Callable, Iterator, Sequence

import mlx.nn as nn

from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.batch import answer_together, can_batch
from ifp_mlx.chat.generation import Answer, GenerationStats
from ifp_mlx.chat.kv_cache import KVCache
from ifp_mlx.chat.sampling import KVCacheOptions, SamplingOptions
from ifp_mlx.errors import DataError

_TOKENS_TOGETHER = 4096
"""Of prompts and answers in memory at once: the conversation for which memory is predicted."""

OnAnswer = Callable[[int], None]
"""Takes how many answers are there."""


def write_answers(
    model: nn.Module,
    assistant: Assistant,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    on_answer: OnAnswer = lambda done: None,
) -> list[list[int]]:
    """Return the token ids with which a model goes on after each prompt. Evaluates.

    Args:
        model: writes.
        assistant: whose tokenizer and context it has.
        prompts: token ids.
        limits: the most new tokens of each; none where it is below 1.
        on_answer: called after each answer.

    Raises:
        DataError: a prompt does not fit in the model's context.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest >= assistant.context_length:
        raise DataError(
            f"an example has {longest} tokens, the model's context is {assistant.context_length}"
        )
    answers: list[list[int]] = [[] for _ in prompts]
    wanted = [index for index, limit in enumerate(limits) if limit > 0]
    done = len(prompts) - len(wanted)
    is_together = can_batch(model)
    for group in _groups([len(prompts[i]) + limits[i] for i in wanted]):
        indices = [wanted[position] for position in group]
        if not is_together:
            for index in indices:
                answers[index], _ = write_answer(model, assistant, prompts[index], limits[index])
                done += 1
                on_answer(done)
            continue
        for answer in answer_together(
            model,
            assistant.tokenizer,
            [prompts[index] for index in indices],
            SamplingOptions(),
            assistant.context_length,
            [limits[index] for index in indices],
        ):
            answers[indices[answer.index]] = list(answer.token_ids)
            done += 1
            on_answer(done)
    return answers


def write_answer(
    model: nn.Module, assistant: Assistant, prompt_ids: Sequence[int], limit: int
) -> tuple[list[int], GenerationStats]:
    """Return at most so many tokens with which a model goes on, and what that took. Evaluates."""
    options = KVCacheOptions()
    cache = KVCache.empty(model, options)
    answer = Answer(
        model, assistant.tokenizer, prompt_ids, cache, SamplingOptions(), options, limit
    )
    for _ in answer:
        pass
    assert answer.stats is not None
    return cache.token_ids[len(prompt_ids) :], answer.stats


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield positions in order, as many at a time as there is room for; one at least."""
    group: list[int] = []
    total = 0
    for position, length in enumerate(lengths):
        if group and total + length > _TOKENS_TOGETHER:
            yield group
            group, total = [], 0
        group.append(position)
        total += length
    if group:
        yield group
