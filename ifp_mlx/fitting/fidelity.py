"""How far a smaller model answers as the whole one does, in one pass over the whole one's answers.

Where the whole model was sure of a token and the smaller one would have written another, something
changed that chance did not decide. How often that happens tells function better than agreement, KL
or cross-entropy do (docs/fidelity.md).
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

SURE = 0.9
"""The whole model was sure of a token that it gave at least this probability."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """An answer and what the whole model thinks of its tokens.

    Attributes:
        prompt_ids: what was asked.
        answer_ids: T tokens, at least one.
        best: (T,) int32, the token that the whole model finds likeliest at each.
        is_sure: (T,) bool.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    best: mx.array
    is_sure: mx.array

    @classmethod
    def of(cls, model: nn.Module, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Any:
        """Return what a whole model thinks of an answer. Evaluates."""
        logits = answer_logits(model, prompt_ids, answer_ids)
        best = logits.argmax(axis=-1).astype(mx.int32)
        likeliest = mx.exp(logits.max(axis=-1) - mx.logsumexp(logits, axis=-1))
        is_sure = likeliest >= SURE
        mx.eval(best, is_sure)
        return cls(tuple(prompt_ids), tuple(answer_ids), best, is_sure)


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How a model differs from the whole one on some answers.

    Attributes:
        agreement: share of tokens for which both would write the same.
        sure_flips: of 100 tokens that the whole model was sure of, how many would be others.
        same_tokens: median number of an answer's first tokens that stay the same.
    """

    agreement: float
    sure_flips: float
    same_tokens: float


def answer_logits(
    model: nn.Module, prompt_ids: Sequence[int], answer_ids: Sequence[int]
) -> mx.array:
    """Return the (T, V) float32 logits that a model has for the T tokens of an answer. Lazy.

    The prompt is read as the model reads prompts, and the answer by what writes.
    """
    from mlx_lm.models.cache import make_prompt_cache

    writer = cast(nn.Module, getattr(model, "writer", model))
    caches = make_prompt_cache(writer)
    *begun, last = prompt_ids
    if begun:
        model(mx.array([begun]), cache=caches)
        mx.eval([cache.state for cache in caches])
    logits = writer(mx.array([[last, *answer_ids[:-1]]]), cache=caches)[0]
    return cast(mx.array, logits.astype(mx.float32))


def measure_fidelity(model: nn.Module, references: Sequence[Reference]) -> Fidelity:
    """Return how a model differs from the whole one. Evaluates.

    Args:
        model: a smaller one, or one that reads with a part.
        references: at least one.
    """
    same: list[bool] = []
    flips: list[bool] = []
    first_flips: list[int] = []
    for reference in references:
        logits = answer_logits(model, reference.prompt_ids, reference.answer_ids)
        is_same = logits.argmax(axis=-1) == reference.best
        row = cast(list[bool], is_same.tolist())
        sure = cast(list[bool], reference.is_sure.tolist())
        same += row
        flips += [not one for one, is_sure in zip(row, sure, strict=True) if is_sure]
        first_flips.append(row.index(False) if False in row else len(row))
    return Fidelity(
        agreement=sum(same) / len(same),
        sure_flips=100 * sum(flips) / max(len(flips), 1),
        same_tokens=statistics.median(first_flips),
    )
