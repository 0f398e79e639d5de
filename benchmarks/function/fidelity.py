"""Cheap figures of how far a row is from the whole model, token by token, on given answers.

Both models are shown the same answer (teacher-forced); at each of its tokens their next-token
distributions are compared. ``compare`` measures tokens, ``figures`` sums them up.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from decoding import logits_of

Floats = npt.NDArray[np.float32]

SURE = 0.9
"""From this probability on the whole model counts as sure of its next token."""

_CHUNK_TOKENS = 512
"""Tokens whose full distributions are held at once: 0.3 GB each for 150k words of vocabulary."""


@dataclasses.dataclass(frozen=True)
class TokenFigures:
    """Figures of N tokens of A answers, one after the other.

    Attributes:
        lengths: (A,) tokens of each answer.
        whole_top: (N,) probability of the whole model's first choice.
        agree: (N,) 1 where both models' first choices are the same token.
        kl: (N,) divergence of the row's distribution from the whole model's, nats.
        overlap: (N,) sum over words of the lower probability: 1 - total variation; the chance
            that a sampled token of the row is accepted as one of the whole model's.
        margin: (N,) how much more probable the row finds its own first choice than the whole
            model's, nats; 0 where they agree.
        target: (N,) log-probability of the answer's token in the row.
        whole_target: (N,) the same in the whole model.
        right: (N,) 1 where the row's first choice is the answer's token.
        cosine: (N,) cosine of both models' final states.
    """

    lengths: npt.NDArray[np.int32]
    whole_top: Floats
    agree: Floats
    kl: Floats
    overlap: Floats
    margin: Floats
    target: Floats
    whole_target: Floats
    right: Floats
    cosine: Floats

    def save(self, path: Path) -> None:
        """Write an .npz file, in half precision."""
        arrays = {
            field.name: getattr(self, field.name).astype(
                np.int32 if field.name == "lengths" else np.float16
            )
            for field in dataclasses.fields(self)
        }
        np.savez_compressed(path, **arrays)

    def answers(self, values: Floats) -> list[Floats]:
        """Return (N,) values split by answer."""
        return np.split(values, np.cumsum(self.lengths)[:-1])


def compare(
    row: nn.Module,
    row_hidden: Sequence[mx.array],
    whole: nn.Module,
    whole_hidden: Sequence[mx.array],
    answers: Sequence[Sequence[int]],
) -> TokenFigures:
    """Compare two models at every token of some answers. Evaluates.

    Args:
        row: the model that writes in the row.
        row_hidden: its final states for each answer, (T, D).
        whole: the whole model.
        whole_hidden: its final states.
        answers: the T token ids of each.
    """
    hidden, reference = mx.concatenate(list(row_hidden)), mx.concatenate(list(whole_hidden))
    targets = mx.array([token for answer in answers for token in answer])
    columns = []
    for start in range(0, len(targets), _CHUNK_TOKENS):
        part = slice(start, start + _CHUNK_TOKENS)
        measured = _compare_chunk(row, hidden[part], whole, reference[part], targets[part])
        mx.eval(measured)
        columns.append([np.array(values) for values in measured])
    lengths = np.array([len(answer) for answer in answers], np.int32)
    return TokenFigures(lengths, *(np.concatenate(values) for values in zip(*columns, strict=True)))


def figures(tokens: TokenFigures) -> dict[str, float]:
    """Return the candidate figures of a row, all over the same tokens.

    Of "tokens until" figures an answer without the event counts with its whole length.
    """
    flips = 1 - tokens.agree
    sure = (tokens.whole_top >= SURE).astype(np.float32)
    sure_flips = flips * sure
    num_sure = max(float(sure.sum()), 1.0)
    first_sure = np.array([_first(values) for values in tokens.answers(sure_flips)])
    first_any = np.array([_first(values) for values in tokens.answers(flips)])
    accepted = [float(np.log(np.maximum(v, 1e-9)).sum()) for v in tokens.answers(tokens.overlap)]
    ratios = [float(v.sum()) for v in tokens.answers(tokens.target - tokens.whole_target)]
    sure_an_answer = [float(values.sum()) for values in tokens.answers(sure)]
    sure_agreement = 1 - float(sure_flips.sum()) / num_sure
    return {
        "num_answers": float(len(tokens.lengths)),
        "num_tokens": float(tokens.lengths.sum()),
        "agreement": float(tokens.agree.mean()),
        "kl": float(tokens.kl.mean()),
        "kl_p95": float(np.quantile(tokens.kl, 0.95)),
        "kl_p99": float(np.quantile(tokens.kl, 0.99)),
        "kl_where_sure": float((tokens.kl * sure).sum() / num_sure),
        "cross_entropy": float(-tokens.target.mean()),
        "cross_entropy_whole": float(-tokens.whole_target.mean()),
        "cross_entropy_added": float((tokens.whole_target - tokens.target).mean()),
        "target_right": float(tokens.right.mean()),
        "acceptance": float(tokens.overlap.mean()),
        "margin": float(tokens.margin.mean()),
        "margin_p99": float(np.quantile(tokens.margin, 0.99)),
        "cosine_distance": float((1 - tokens.cosine).mean()),
        "weighted_disagreement": float((flips * tokens.whole_top).mean()),
        "sure_flips_per_100": 100 * float(sure_flips.mean()),
        "sure_flips_per_100_sure": 100 * float(sure_flips.sum()) / num_sure,
        "tokens_to_sure_flip_mean": float(first_sure.mean()),
        "tokens_to_sure_flip_median": float(np.median(first_sure)),
        "answers_without_sure_flip": _share(tokens.answers(sure_flips)),
        "tokens_to_flip_mean": float(first_any.mean()),
        "tokens_to_flip_median": float(np.median(first_any)),
        "answers_without_flip": _share(tokens.answers(flips)),
        # Chance that a whole answer survives, three ways: every sure token kept at the mean rate;
        # every sampled token accepted; as probable in the row as in the whole model.
        "survival_sure": float(np.mean([sure_agreement**count for count in sure_an_answer])),
        "survival_accepted": float(np.mean(np.exp(accepted))),
        "survival_accepted_geometric": math.exp(float(np.mean(accepted))),
        "answer_log_ratio": float(np.mean(ratios)),
        "survival_ratio": float(np.mean(np.exp(np.minimum(ratios, 0)))),
    }


def free_running(
    answers: Sequence[Sequence[int]], whole_answers: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Return how long a row's own greedy answers stay those of the whole model.

    ``same_n``: share of answers whose first n tokens are the same (all of them, if shorter).
    """
    pairs = list(zip(answers, whole_answers, strict=True))
    first = [_common_prefix(answer, whole) for answer, whole in pairs]
    shares = {
        f"same_{n}": float(np.mean([a[:n] == w[:n] for a, w in pairs])) for n in (8, 16, 32, 64)
    }
    return {
        **shares,
        "same_whole_answer": float(np.mean([a == w for a, w in pairs])),
        "same_tokens_mean": float(np.mean(first)),
        "same_tokens_median": float(np.median(first)),
    }


def right_lines(
    tokens: TokenFigures, answers: Sequence[Sequence[int]], decoded: Sequence[Sequence[str]]
) -> list[float]:
    """Return the share of an answer's lines that the row would write exactly, for each answer.

    A line is right if the row's first choice is right at each of its tokens, given what stands
    before. The last line, cut off, and blank lines do not count.

    Args:
        tokens: of the answers.
        answers: token ids.
        decoded: the text of each of their tokens.
    """
    shares = []
    for right, ids, texts in zip(tokens.answers(tokens.right), answers, decoded, strict=True):
        lines: list[bool] = []
        start = 0
        for position in range(len(ids)):
            if "\n" in texts[position]:
                if "".join(texts[start : position + 1]).strip():
                    lines.append(bool(right[start : position + 1].all()))
                start = position + 1
        shares.append(float(np.mean(lines)) if lines else 0.0)
    return shares


def _compare_chunk(
    row: nn.Module, hidden: mx.array, whole: nn.Module, reference: mx.array, targets: mx.array
) -> tuple[mx.array, ...]:
    log_q = _log_probabilities(row, hidden)  # (N, V)
    log_p = _log_probabilities(whole, reference)
    p, q = mx.exp(log_p), mx.exp(log_q)
    top_p, top_q = mx.argmax(log_p, axis=-1), mx.argmax(log_q, axis=-1)
    return (
        p.max(axis=-1),
        (top_p == top_q).astype(mx.float32),
        mx.maximum((p * (log_p - log_q)).sum(axis=-1), 0),
        mx.minimum(p, q).sum(axis=-1),
        log_q.max(axis=-1) - _at(log_q, top_p),
        _at(log_q, targets),
        _at(log_p, targets),
        (top_q == targets).astype(mx.float32),
        _cosine(hidden.astype(mx.float32), reference.astype(mx.float32)),
    )


def _log_probabilities(model: nn.Module, hidden: mx.array) -> mx.array:
    logits = logits_of(model, hidden).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _at(values: mx.array, positions: mx.array) -> mx.array:
    return mx.take_along_axis(values, positions[:, None], axis=-1).squeeze(-1)


def _cosine(a: mx.array, b: mx.array) -> mx.array:
    return (a * b).sum(axis=-1) / (mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1))


def _first(events: Floats) -> int:
    """Return the position of the first event, the length if there is none."""
    found = np.flatnonzero(events)
    return int(found[0]) if found.size else len(events)


def _share(answers: Sequence[Floats]) -> float:
    return float(np.mean([not values.any() for values in answers]))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
