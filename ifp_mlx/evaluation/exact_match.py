"""Exact match of numeric answers: the model answers greedily, its last number counts.

A line of a file is ``{"prompt", "answer": NUMBER}``. A line of an instruction file,
``{"prompt", "response"}``, is used too if its response ends in a number, behind ``####`` or not.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from ifp_mlx.chat.chat_template import ChatTokenizer, chat_ids
from ifp_mlx.errors import DataError
from ifp_mlx.evaluation.quality import MAX_PROMPT_TOKENS, HeldOutExample
from ifp_mlx.text.examples import domain_of
from ifp_mlx.text.records import BadLines, is_usable_text, question_of, read_records

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w])|-?\.\d+")
_ENDING = re.compile(r"(?:####\s*)?\$?(-?[\d,]*\.?\d+)\s*[%.]?\s*$")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question whose answer is a number.

    Attributes:
        prompt: the question; nothing of it is scored.
        answer: the number.
    """

    prompt: HeldOutExample
    answer: Decimal


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, None if there is none.

    Thousands may be set off by commas; a word with digits in it (``x2``) is no number.
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def load_problems(path: Path, tokenizer: ChatTokenizer, limit: int) -> list[Problem]:
    """Return the first ``limit`` problems of a file whose prompts are short enough.

    Raises:
        DataError: the file cannot be read, a line is no problem, or none fits. Lines whose
            response does not end in a number are passed over.
    """
    problems: list[Problem] = []
    bad = BadLines()
    for record in read_records(path, _check, bad):
        answer = _answer_of(record)
        if answer is None:
            bad.counts["no number at the end"] += 1
            continue
        ids = tuple(chat_ids(tokenizer, question_of(record)))
        if len(ids) > MAX_PROMPT_TOKENS:
            bad.counts["prompt too long"] += 1
            continue
        problems.append(Problem(HeldOutExample(ids, len(ids), domain_of(path)), answer))
        if len(problems) == limit:
            break
    bad.warn(path)
    if not problems:
        raise DataError(f"{path} holds no problem with a numeric answer that fits")
    return problems


def exact_match(
    problems: Sequence[Problem],
    model_for: Callable[[HeldOutExample], nn.Module],
    tokenizer: Any,
    max_new_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Return the share of problems whose answer is the last number that the model writes.

    Args:
        problems: what to ask.
        model_for: from a prompt to the model that answers it.
        tokenizer: mlx-lm's wrapper, whose end tokens stop an answer.
        max_new_tokens: longest answer.
        progress: called with (problems done, all).
    """
    right = 0
    for number, problem in enumerate(problems, start=1):
        model = model_for(problem.prompt)
        ids = list(_greedy(model, problem.prompt.token_ids, tokenizer, max_new_tokens))
        right += last_number(tokenizer.decode(ids)) == problem.answer
        progress(number, len(problems))
    return right / len(problems)


def _greedy(
    model: nn.Module, prompt_ids: Sequence[int], tokenizer: Any, max_new_tokens: int
) -> Iterator[int]:
    steps = generate_step(mx.array(list(prompt_ids)), model, max_tokens=max_new_tokens)
    for token, _ in cast(Iterator[tuple[int, mx.array]], steps):
        if token in tokenizer.eos_token_ids:
            return
        yield int(token)


def _answer_of(record: dict[str, Any]) -> Decimal | None:
    if "answer" in record:
        return last_number(str(record["answer"]))
    ending = _ENDING.search(record["response"])
    return None if ending is None else last_number(ending[1])


def _check(record: dict[str, Any]) -> str | None:
    if not is_usable_text(record.get("prompt")):
        return "field 'prompt' is missing or empty"
    if "answer" in record:
        is_number = last_number(str(record["answer"])) is not None
        return None if is_number else "field 'answer' is not a number"
    return None if is_usable_text(record.get("response")) else "field 'answer' is missing"
