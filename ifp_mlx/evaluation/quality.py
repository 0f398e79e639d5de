"""Cross-entropy, agreement with the dense model and perplexity on held-out text, by domain."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ifp_mlx.chat.chat_template import ChatTokenizer, chat_ids
from ifp_mlx.errors import DataError
from ifp_mlx.selection.reading import pad_right
from ifp_mlx.text.examples import domain_of
from ifp_mlx.text.records import (
    BadLines,
    check_document,
    check_prompt_response,
    question_of,
    read_records,
)
from ifp_mlx.units.masks import set_unit_masks
from ifp_mlx.units.modules import copy_module, family_of

DOCUMENT_PREFIX = "lm_"
"""Files of documents are named so; the others hold prompts and responses."""

MAX_PROMPT_TOKENS = 768
"""Examples with a longer prompt are passed over."""

MAX_SCORED_TOKENS = 256
"""Of an answer the first 256 tokens are scored; of a document, tokens 256 to 511."""

DOCUMENT_PROMPT_TOKENS = 256
"""The part of a document that selects; the rest is scored behind it."""

_BATCH_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class HeldOutExample:
    """One piece of held-out text.

    Attributes:
        token_ids: the prompt and what is scored.
        num_prompt_tokens: the prompt, which selects; scoring begins behind it.
        domain: the file's name.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    domain: str

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens that select."""
        return self.token_ids[: self.num_prompt_tokens]


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well a model predicts one domain's held-out text.

    Attributes:
        cross_entropy: nats a scored token.
        num_tokens: scored tokens.
        num_examples: scored examples.
        kl: nats a token of KL(dense || model), or None without a reference.
        top1: share of tokens whose most likely successor is the reference's, or None.
    """

    cross_entropy: float
    num_tokens: int
    num_examples: int
    kl: float | None = None
    top1: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy)."""
        return math.exp(self.cross_entropy)

    @classmethod
    def of_all(cls, measured: Sequence["Quality"]) -> "Quality":
        """Return the quality on everything that some others, at least one, were measured on."""
        num_tokens = sum(one.num_tokens for one in measured)

        def mean(name: str) -> float | None:
            values = [getattr(one, name) for one in measured]
            if None in values:
                return None
            weighted = zip(values, measured, strict=True)
            return float(sum(value * one.num_tokens for value, one in weighted) / num_tokens)

        return cls(
            cross_entropy=mean("cross_entropy") or 0.0,
            num_tokens=num_tokens,
            num_examples=sum(one.num_examples for one in measured),
            kl=mean("kl"),
            top1=mean("top1"),
        )


MaskFunction = Callable[[Sequence[HeldOutExample]], mx.array | None]
"""From a batch of examples to masks: (L, F), (B, L, F), or None for the dense model."""


def load_held_out(
    folder: Path,
    tokenizer: ChatTokenizer,
    limit: int,
    domains: Sequence[str] | None = None,
) -> dict[str, list[HeldOutExample]]:
    """Return the first ``limit`` usable examples of each file of a folder, by domain.

    Args:
        folder: holds NAME.jsonl (prompt, response) and lm_NAME.jsonl (text).
        tokenizer: of the model; prompts go through its chat template.
        limit: examples a domain, in the file's order.
        domains: only these; None is all.

    Raises:
        DataError: no such folder or file, or a file that cannot be read.
    """
    paths = sorted(
        path for path in folder.glob("*.jsonl") if not domains or domain_of(path) in domains
    )
    if not paths:
        raise DataError(f"{folder} holds no .jsonl file to evaluate on")
    return {domain_of(path): _read_domain(path, tokenizer, limit) for path in paths}


def _read_domain(path: Path, tokenizer: ChatTokenizer, limit: int) -> list[HeldOutExample]:
    domain = domain_of(path)
    examples: list[HeldOutExample] = []
    is_document = domain.startswith(DOCUMENT_PREFIX)
    check = check_document if is_document else check_prompt_response
    bad = BadLines(skip=True)
    for record in read_records(path, check, bad):
        if is_document:
            ids = tokenizer.encode(record["text"], add_special_tokens=False)
            prompt_tokens = DOCUMENT_PROMPT_TOKENS
        else:
            prompt = chat_ids(tokenizer, question_of(record))
            prompt_tokens = len(prompt)
            ids = prompt + tokenizer.encode(record["response"], add_special_tokens=False)
        ids = ids[: prompt_tokens + MAX_SCORED_TOKENS]
        if prompt_tokens > MAX_PROMPT_TOKENS or len(ids) <= prompt_tokens:
            bad.counts["outside the limits of the evaluation"] += 1
            continue
        examples.append(HeldOutExample(tuple(ids), prompt_tokens, domain))
        if len(examples) == limit:
            break
    bad.warn(path)
    if not examples:
        raise DataError(f"{path} holds no example that fits the limits of the evaluation")
    return examples


def load_task_descriptions(path: Path) -> dict[str, str]:
    """Return domain -> the one sentence that selects for it.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return {str(name): str(text) for name, text in values.items()}


def evaluate(
    model: nn.Module,
    examples: Sequence[HeldOutExample],
    masks: MaskFunction,
    reference: nn.Module | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Quality]:
    """Return the quality of a masked model, by domain. Evaluates.

    Args:
        model: made by ``with_unit_masks``, or a plain model if ``masks`` gives None.
        examples: of any domains.
        masks: called once a batch with its examples.
        reference: the dense model to compare with, for KL and top-1 agreement.
        progress: called with (examples done, all).
    """
    sums: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].token_ids))
    start = 0
    while start < len(order):
        rows = max(1, _BATCH_TOKENS // len(examples[order[start]].token_ids))
        batch = [examples[i] for i in order[start : start + rows]]
        start += len(batch)
        batch_masks = masks(batch)
        if batch_masks is not None:
            set_unit_masks(model, batch_masks)
        for example, figures in zip(batch, _score(model, batch, reference), strict=True):
            total = sums.setdefault(example.domain, np.zeros(5))
            total += figures
        progress(start, len(order))
    return {
        domain: Quality(
            cross_entropy=float(total[0] / total[1]),
            num_tokens=int(total[1]),
            num_examples=int(total[2]),
            kl=None if reference is None else float(total[3] / total[1]),
            top1=None if reference is None else float(total[4] / total[1]),
        )
        for domain, total in sorted(sums.items())
    }


def mean_cross_entropy(qualities: dict[str, Quality], *, documents: bool) -> float:
    """Return the mean over domains, of documents or of instructions, of the cross-entropy."""
    chosen = [
        quality.cross_entropy
        for domain, quality in qualities.items()
        if domain.startswith(DOCUMENT_PREFIX) == documents
    ]
    return float(np.mean(chosen)) if chosen else math.nan


def _score(
    model: nn.Module, batch: Sequence[HeldOutExample], reference: nn.Module | None
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return (B, 5): sum of cross-entropy, tokens, 1, sum of KL, agreeing tokens. Evaluates."""
    ids, _ = pad_right([example.token_ids for example in batch])
    scored = np.zeros(ids.shape, dtype=np.bool_)
    for row, example in zip(scored, batch, strict=True):
        row[example.num_prompt_tokens - 1 : len(example.token_ids) - 1] = True
    positions = np.flatnonzero(scored)
    labels = mx.array(np.roll(np.array(ids), -1, axis=1).reshape(-1)[positions])
    log_probs = _log_probabilities(model, ids, positions)
    losses = -mx.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    columns = [losses, mx.ones_like(losses), mx.zeros_like(losses)]
    if reference is None:
        columns += [mx.zeros_like(losses), mx.zeros_like(losses)]
    else:
        dense = _log_probabilities(reference, ids, positions)
        columns.append((mx.exp(dense) * (dense - log_probs)).sum(axis=-1))
        agrees = dense.argmax(axis=-1) == log_probs.argmax(axis=-1)
        columns.append(agrees.astype(mx.float32))
    table = np.array(mx.stack(columns, axis=-1)).astype(np.float64)  # (N, 5)
    figures = np.zeros((len(batch), 5))
    np.add.at(figures, positions // ids.shape[1], table)
    figures[:, 2] = 1.0
    return figures


def _log_probabilities(
    model: nn.Module, ids: mx.array, positions: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]"
) -> mx.array:
    """Return the (N, V) float32 log probabilities at flat positions of a batch."""
    answers = _answering_at(model, mx.array(positions.astype(np.int32)))
    logits: mx.array = answers(ids)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _answering_at(model: nn.Module, positions: mx.array) -> nn.Module:
    """Return a copy of a model that gives (1, N, V) logits: those at N flat positions of a batch.

    The vocabulary is wide, and few positions are scored. What a family does to its logits (scales,
    caps) is in its own call, so that is what makes them.
    """
    path = family_of(model).trunk
    holder_path, _, name = path.rpartition(".")
    copy = holder = copy_module(model)
    for part in holder_path.split(".") if holder_path else ():
        holder[part] = copy_module(holder[part])
        holder = holder[part]
    inner = copy_module(holder[name])
    kind: type[Any] = type(inner)

    class Picked(kind):  # type: ignore[misc]
        def __call__(self, *inputs: Any, **options: Any) -> mx.array:
            hidden: mx.array = super().__call__(*inputs, **options)
            return hidden.reshape(1, -1, hidden.shape[-1])[:, positions]

    inner.__class__ = Picked
    holder[name] = inner
    return copy
