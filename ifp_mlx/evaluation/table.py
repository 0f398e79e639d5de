"""Quality tables: every row measured on the same held-out text."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ifp_mlx.evaluation.controls import UnitMasks
from ifp_mlx.evaluation.cut import evaluate_cut
from ifp_mlx.evaluation.exact_match import Problem, exact_match
from ifp_mlx.evaluation.multiple_choice import ChoiceAccuracy, Question, choice_accuracy
from ifp_mlx.evaluation.quality import (
    DOCUMENT_PREFIX,
    HeldOutExample,
    Quality,
    mean_cross_entropy,
)
from ifp_mlx.evaluation.rows import Row
from ifp_mlx.evaluation.subject import Subject

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, all)."""


@dataclasses.dataclass(frozen=True)
class RowResult:
    """What a row measured.

    Attributes:
        row: the row.
        qualities: by domain.
    """

    row: Row
    qualities: dict[str, Quality]

    def mean_cross_entropy(self, *, documents: bool) -> float:
        """Return the mean over the domains, NaN without any."""
        return mean_cross_entropy(self.qualities, documents=documents)

    @property
    def cross_entropy_per_token(self) -> float:
        """Every scored token weighs alike: steadier where texts are few and answers short."""
        qualities = self.qualities.values()
        nats = sum(quality.cross_entropy * quality.num_tokens for quality in qualities)
        return nats / sum(quality.num_tokens for quality in qualities)

    def mean(self, name: str) -> float | None:
        """Return the mean over all domains of ``kl`` or ``top1``, None if it was not measured."""
        values = [getattr(quality, name) for quality in self.qualities.values()]
        return None if not values or None in values else float(np.mean(values))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        means = {
            "instructions": self.mean_cross_entropy(documents=False),
            "documents": self.mean_cross_entropy(documents=True),
        }
        return {
            "row": self.row.label,
            "num_kept_units": self.row.num_kept_units,
            "cross_entropy_per_token": self.cross_entropy_per_token,
            "mean_cross_entropy": {k: None if math.isnan(v) else v for k, v in means.items()},
            "domains": {
                domain: {**dataclasses.asdict(quality), "perplexity": quality.perplexity}
                for domain, quality in self.qualities.items()
            },
        }


def shortened(
    examples: Mapping[str, Sequence[HeldOutExample]], max_scored_tokens: int
) -> dict[str, list[HeldOutExample]]:
    """Return the examples with at most so many scored tokens each: less precise, but faster."""
    return {
        domain: [
            dataclasses.replace(e, token_ids=e.token_ids[: e.num_prompt_tokens + max_scored_tokens])
            for e in domain_examples
        ]
        for domain, domain_examples in examples.items()
    }


def measure_rows(
    subject: Subject,
    rows: Sequence[Row],
    examples: Mapping[str, Sequence[HeldOutExample]],
    *,
    with_reference: bool = False,
    progress: Progress = lambda stage, done, total: None,
    on_row: Callable[[RowResult], None] = lambda result: None,
) -> list[RowResult]:
    """Return what each row measures, in the rows' order. Evaluates.

    Args:
        subject: the model and what belongs to it.
        rows: all different.
        examples: by domain.
        with_reference: measure KL to the dense base model and top-1 agreement, which takes a
            second forward pass.
        progress: called with (what is being done, examples done, all).
        on_row: called with each result as soon as it is there.

    Raises:
        UsageError: a row needs what the subject lacks; nothing was measured then.
    """
    together = [example for domain in examples.values() for example in domain]
    masks = _masks(subject, rows, together, progress)
    results = []
    for row in rows:
        results.append(
            RowResult(row, _measure(subject, row, masks[row], examples, with_reference, progress))
        )
        on_row(results[-1])
    return results


def _measure(
    subject: Subject,
    row: Row,
    masks: UnitMasks | None,
    examples: Mapping[str, Sequence[HeldOutExample]],
    with_reference: bool,
    progress: Progress,
) -> dict[str, Quality]:
    dense = subject.dense_model(row)
    qualities: dict[str, Quality] = {}
    done, total = 0, sum(map(len, examples.values()))
    # Domain by domain: a batch's logits over the whole vocabulary stay small.
    for domain_examples in examples.values():
        reference = subject.model if with_reference else None
        qualities |= evaluate_cut(dense, masks, domain_examples, reference)
        done += len(domain_examples)
        progress(row.label, done, total)
    return qualities


def measure_choices(
    subject: Subject,
    rows: Sequence[Row],
    questions: Sequence[Question],
    progress: Progress = lambda stage, done, total: None,
) -> dict[Row, ChoiceAccuracy]:
    """Return each row's accuracy on multiple-choice questions. Evaluates.

    Raises:
        UsageError: a row needs what the subject lacks.
    """
    prompts = [question.prompt for question in questions]
    masks = _masks(subject, rows, prompts, progress)
    return {
        row: choice_accuracy(subject.dense_model(row), questions, masks[row], _stage(progress, row))
        for row in rows
    }


def measure_numbers(
    subject: Subject,
    rows: Sequence[Row],
    problems: Sequence[Problem],
    max_new_tokens: int,
    progress: Progress = lambda stage, done, total: None,
) -> dict[Row, float]:
    """Return each row's share of right numeric answers, from sliced models. Evaluates.

    Raises:
        UsageError: a row needs what the subject lacks.
    """
    prompts = [problem.prompt for problem in problems]
    masks = _masks(subject, rows, prompts, progress)
    return {
        row: exact_match(
            problems,
            functools.partial(subject.compact_model, row, masks[row]),
            subject.tokenizer,
            max_new_tokens,
            _stage(progress, row),
        )
        for row in rows
    }


def _masks(
    subject: Subject, rows: Sequence[Row], prompts: Sequence[HeldOutExample], progress: Progress
) -> dict[Row, UnitMasks | None]:
    for row in rows:
        subject.check(row, {prompt.domain for prompt in prompts})
    return subject.masks(rows, prompts, progress)


def _stage(progress: Progress, row: Row) -> Callable[[int, int], None]:
    return functools.partial(progress, row.label)


def markdown_table(results: Sequence[RowResult]) -> str:
    """Return a Markdown table of cross-entropies: a line a row, a column a domain.

    In front of the domains, their mean; "all tokens" weighs every scored token alike.
    """
    domains = list(results[0].qualities)
    instructions = [d for d in domains if not d.startswith(DOCUMENT_PREFIX)]
    documents = [d for d in domains if d.startswith(DOCUMENT_PREFIX)]
    columns = ["row", "K", "all tokens"]
    if instructions:
        columns += ["instructions", *instructions]
    if documents:
        columns += ["documents", *(d.removeprefix(DOCUMENT_PREFIX) for d in documents)]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    for result in results:
        cells = [result.row.name, str(result.row.num_kept_units)]
        cells.append(f"{result.cross_entropy_per_token:.3f}")
        for is_documents, chosen in ((False, instructions), (True, documents)):
            if chosen:
                cells.append(f"**{result.mean_cross_entropy(documents=is_documents):.3f}**")
                cells += [f"{result.qualities[d].cross_entropy:.2f}" for d in chosen]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
