"""How far a smaller model answers as the whole one does, in one pass over the whole one's answers.

Of 100 tokens sampled where the whole model was, how many would be others: the total variation
between both models' next tokens. It orders models by what they still get right as well as KL does
and better than counts of changed tokens, and a few hundred tokens are enough (docs/fidelity.md).
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn

TOP_TOKENS = 64
"""Of each distribution of the whole model the likeliest tokens are kept; all others count as one.
That can only make two models look more alike (docs/fidelity.md)."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """An answer and what the whole model thinks of its tokens.

    Attributes:
        prompt_ids: what was asked.
        answer_ids: T tokens, at least one.
        top: (T, N) int32, the tokens that the whole model finds likeliest at each, best first.
        probabilities: (T, N) float32, theirs.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    top: mx.array
    probabilities: mx.array

    @classmethod
    def of(
        cls, model: nn.Module, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> "Reference":
        """Return what a whole model thinks of an answer. Evaluates."""
        logits = answer_logits(model, prompt_ids, answer_ids)
        num_top = min(TOP_TOKENS, logits.shape[-1])
        top = mx.argpartition(-logits, num_top - 1, axis=-1)[:, :num_top]
        order = mx.argsort(-mx.take_along_axis(logits, top, axis=-1), axis=-1)
        top = mx.take_along_axis(top, order, axis=-1).astype(mx.int32)
        probabilities = probabilities_of(logits, top)
        mx.eval(top, probabilities)
        return cls(tuple(prompt_ids), tuple(answer_ids), top, probabilities)


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How a model differs from the whole one on some answers.

    Attributes:
        changed: of 100 tokens sampled where the whole model was, how many would be others.
        same_tokens: median number of an answer's first tokens that stay the same, greedily.
    """

    changed: float
    same_tokens: float

    @classmethod
    def of(cls, answers: Sequence["Comparison"]) -> "Fidelity":
        """Return the figures of some answers, at least one."""
        changed = [token for answer in answers for token in answer.changed]
        same_tokens = statistics.median(answer.same_tokens for answer in answers)
        return cls(100 * statistics.fmean(changed), float(same_tokens))


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


def probabilities_of(logits: mx.array, tokens: mx.array) -> mx.array:
    """Return the (T, N) probabilities of (T, N) tokens from (T, V) logits. Lazy."""
    chosen = mx.take_along_axis(logits, tokens, axis=-1)
    return mx.exp(chosen - mx.logsumexp(logits, axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a model differs from the whole one on one answer.

    Attributes:
        changed: of each token, how likely another would be sampled; 0 to 1.
        same_tokens: so many first tokens are the same, greedily.
    """

    changed: tuple[float, ...]
    same_tokens: int

    @classmethod
    def same(cls, reference: Reference) -> "Comparison":
        """Return how the whole model differs from itself."""
        num_tokens = len(reference.answer_ids)
        return cls((0.0,) * num_tokens, num_tokens)

    @classmethod
    def of(cls, model: nn.Module, reference: Reference) -> "Comparison":
        """Compare a model, or one that reads with a part, with the whole one. Evaluates."""
        logits = answer_logits(model, reference.prompt_ids, reference.answer_ids)
        difference = probabilities_of(logits, reference.top) - reference.probabilities
        others = mx.abs(difference.sum(axis=-1))  # all that are not among the likeliest
        variation = (mx.abs(difference).sum(axis=-1) + others) / 2
        is_same = logits.argmax(axis=-1) == reference.top[:, 0]
        mx.eval(variation, is_same)
        row = cast(list[bool], is_same.tolist())
        first_flip = row.index(False) if False in row else len(row)
        return cls(tuple(cast(list[float], variation.tolist())), first_flip)
