"""Calibration examples from JSON-lines files."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ifp_mlx.chat.chat_template import ChatTokenizer, chat_ids
from ifp_mlx.selection.calibration import CalibrationExample
from ifp_mlx.text.records import (
    BadLines,
    check_document,
    check_prompt_response,
    is_usable_text,
    messages_of,
    read_records,
)


@dataclasses.dataclass(frozen=True)
class CalibrationLimits:
    """How much is read.

    Attributes:
        max_tokens: of each example; the rest of it is cut off.
        num_examples: drawn at random from each file; None reads all.
        seed: of the draw.
    """

    max_tokens: int = 512
    num_examples: int | None = None
    seed: int = 0


def calibration_examples(
    paths: Sequence[Path],
    tokenizer: ChatTokenizer,
    limits: CalibrationLimits,
    bad: BadLines,
    *,
    task_of_file: bool = False,
) -> Iterator[CalibrationExample]:
    """Yield examples one at a time, file after file.

    A record is a document (``text``), a pair (``prompt``, ``response``) or a conversation
    (``messages``); pairs and conversations go through the chat template, as in use.

    Args:
        paths: .jsonl or .jsonl.xz files.
        tokenizer: of the model.
        limits: how much is read.
        bad: what to do with lines that cannot be used.
        task_of_file: a file's name, up to the first dot, is the task of its records; otherwise
            their ``task`` field is, if there is one.

    Raises:
        DataError: a file is missing or damaged, or a line cannot be used.
    """
    for path in paths:
        records = read_records(path, _check, bad)
        if limits.num_examples is not None:
            records = _draw(records, limits.num_examples, random.Random(limits.seed))
        for record in records:
            task = path.name.partition(".")[0] if task_of_file else record.get("task")
            yield CalibrationExample(_token_ids(record, tokenizer)[: limits.max_tokens], task)


def _draw(
    records: Iterator[dict[str, Any]], count: int, generator: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield ``count`` records drawn evenly from a stream of unknown length (reservoir)."""
    kept: list[dict[str, Any]] = []
    for number, record in enumerate(records):
        if number < count:
            kept.append(record)
        elif (place := generator.randrange(number + 1)) < count:
            kept[place] = record
    yield from kept


def _check(record: dict[str, Any]) -> str | None:
    if "task" in record and not is_usable_text(record["task"]):
        return "field 'task' is not a name"
    return check_document(record) if "text" in record else check_prompt_response(record)


def _token_ids(record: dict[str, Any], tokenizer: ChatTokenizer) -> list[int]:
    if "text" in record:
        return list(tokenizer.encode(record["text"]))
    return chat_ids(tokenizer, messages_of(record), add_generation_prompt=False)
