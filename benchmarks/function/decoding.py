"""Reading prompts with one model and writing answers with another, over one KV cache.

Sub-networks share attention with their source, so either can go on from what the other has read.
A *plan* says which model reads which token ids; prompts are read one by one, exactly as a program
with one user does, then the caches are joined and the answers are written as one batch.
"""

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache
from prompts import Prompt

READ_STEP = 2048
"""Tokens of a prompt that are read in one forward pass."""

CHECK_STEPS = 16
"""Decoding steps between looks at which answers have ended; each look waits for the device."""

Cache = list[KVCache]


class Reader(enum.Enum):
    """Who reads a stretch of text."""

    READ = "read"
    """The model that the row names for reading."""
    WRITE = "write"
    """The model that writes the answers."""
    WHOLE = "whole"
    """The whole model, whatever the row says."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a prompt is read.

    Attributes:
        tail: how many last tokens of each prompt are read by the model that writes; at least 1,
            since that is where the first token of the answer comes from. "message": the whole
            last message.
        block: how many first tokens are read by the whole model, which chooses units on them.
    """

    tail: int | Literal["message"] = 1
    block: int = 0


@dataclasses.dataclass(frozen=True)
class Segment:
    """Token ids and who reads them."""

    reader: Reader
    ids: tuple[int, ...]


def plan_reading(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], reading: Reading
) -> tuple[list[Segment], int]:
    """Return who reads which part of a conversation, and the token that is left to the writer.

    Args:
        prompts: of the turns so far; the last one is to be answered.
        answers: to all turns but the last: what the writing model wrote, it has read.
        reading: how prompts are read.
    """
    segments: list[Segment] = []
    position = 0
    for index, prompt in enumerate(prompts):
        size = len(prompt.ids)
        tail = size - prompt.last_message if reading.tail == "message" else reading.tail
        own = max(size - max(tail, 1), 0)
        block = min(max(reading.block - position, 0), own)
        segments += [
            Segment(Reader.WHOLE, prompt.ids[:block]),
            Segment(Reader.READ, prompt.ids[block:own]),
            Segment(Reader.WRITE, prompt.ids[own:]),
        ]
        position += size
        if index < len(answers):
            segments.append(Segment(Reader.WRITE, tuple(answers[index])))
            position += len(answers[index])
    last = segments.pop()
    segments.append(Segment(last.reader, last.ids[:-1]))
    return [segment for segment in segments if segment.ids], last.ids[-1]


def read(segments: Iterable[tuple[nn.Module, Sequence[int]]], num_layers: int) -> Cache:
    """Return the KV cache of a text of which each stretch is read by its model.

    Plain caches also for layers with a sliding window: the mask holds the window, and a plain
    cache can be joined with others of any length. Starts the work and does not wait for it.
    """
    cache = [KVCache() for _ in range(num_layers)]
    for model, ids in segments:
        for start in range(0, len(ids), READ_STEP):
            model.model(mx.array([list(ids[start : start + READ_STEP])]), cache)
            mx.async_eval([layer.state[:2] for layer in cache])
    return cache


def answer_hidden(model: nn.Module, cache: Cache, last_id: int, answer: Sequence[int]) -> mx.array:
    """Return the (T, D) states from which a model would write each id of a given answer. Lazy.

    Args:
        model: the writer.
        cache: of the prompt without its last token; it grows.
        last_id: the prompt's last token.
        answer: T ids.
    """
    ids = [last_id, *answer[:-1]]
    hidden: mx.array = model.model(mx.array([ids]), cache)
    return hidden[0]


def logits_of(model: nn.Module, hidden: mx.array) -> mx.array:
    """Return the (..., V) logits of (..., D) final states. Lazy."""
    if "lm_head" in model:
        return model.lm_head(hidden)  # type: ignore[no-any-return]
    return model.model.embed_tokens.as_linear(hidden)  # type: ignore[no-any-return]


def write(
    model: nn.Module,
    caches: Sequence[Cache],
    last_ids: Sequence[int],
    max_new_tokens: int,
    stop_ids: Iterable[int],
) -> list[list[int]]:
    """Return the greedy answer to each prompt, written as one batch. Evaluates.

    Args:
        model: the writer.
        caches: of the prompts, each without its last token; they are not changed.
        last_ids: the last token of each prompt.
        max_new_tokens: where an answer is cut off.
        stop_ids: end an answer, and are its last id.
    """
    stops = set(stop_ids)
    answers: list[list[int]] = [[] for _ in caches]
    batch = [KVCache.merge(list(layer)) for layer in zip(*caches, strict=True)]
    running = list(range(len(caches)))
    tokens = mx.array(list(last_ids))[:, None]  # (B, 1)
    written = 0
    while running and written < max_new_tokens:
        steps = []
        for _ in range(min(CHECK_STEPS, max_new_tokens - written)):
            hidden = model.model(tokens, batch)
            tokens = mx.argmax(logits_of(model, hidden), axis=-1)  # (B, 1)
            mx.async_eval(tokens)
            steps.append(tokens)
        written += len(steps)
        new_ids = np.array(mx.concatenate(steps, axis=1))  # (B, steps)
        still = []
        for row, index in enumerate(running):
            if answers[index] and answers[index][-1] in stops:
                continue
            answers[index] += _until_stop(new_ids[row].tolist(), stops)
            if answers[index][-1] not in stops:
                still.append(row)
        if len(still) <= len(running) // 2:  # a smaller batch is worth a copy of the caches
            running = [running[row] for row in still]
            if running:
                kept = mx.array(still)
                for layer in batch:
                    layer.filter(kept)
                tokens = tokens[kept]
    return answers


def batches(lengths: Sequence[int], max_items: int, max_tokens: int) -> list[list[int]]:
    """Return indices of texts grouped by length: at most so many, and so many padded tokens."""
    grouped: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        group = grouped[-1] if grouped else []
        longest = lengths[group[0]] if group else 0
        if not group or len(group) == max_items or longest * (len(group) + 1) > max_tokens:
            grouped.append([index])
        else:
            group.append(index)
    return grouped


def cache_bytes_per_token(model: nn.Module) -> int:
    """Return the size of one token in the KV cache of an mlx-lm model with grouped heads."""
    arguments = model.args
    head_dim = getattr(arguments, "head_dim", None) or (
        arguments.hidden_size // arguments.num_attention_heads
    )
    heads = getattr(arguments, "num_key_value_heads", None) or arguments.num_attention_heads
    itemsize = model.model.norm.weight.dtype.size
    return 2 * len(model.layers) * int(heads) * int(head_dim) * int(itemsize)


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stops:
            return ids[: position + 1]
    return ids
