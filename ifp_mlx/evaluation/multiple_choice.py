"""Multiple choice by log-likelihood: the answer that the model finds most likely counts.

A line of a file is ``{"prompt", "choices": [...], "answer": INDEX}``. A line of an instruction
file, ``{"prompt", "response"}``, is used too if its prompt lists options as ``(A) text`` or
``A: text`` and its response is one of the letters; the letters are then the choices.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from ifp_mlx.chat.chat_template import ChatTokenizer, chat_ids
from ifp_mlx.errors import DataError
from ifp_mlx.evaluation.controls import UnitMasks
from ifp_mlx.evaluation.cut import evaluate_cut
from ifp_mlx.evaluation.quality import MAX_PROMPT_TOKENS, HeldOutExample
from ifp_mlx.text.examples import domain_of
from ifp_mlx.text.records import BadLines, is_usable_text, question_of, read_records

_OPTION = re.compile(r"(?:(?<=\s)|^)(?:\(([A-Z])\)|(?:- )?([A-Z]):)\s", re.MULTILINE)
_LETTER = re.compile(r"\(?([A-Z])\)?")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its possible answers.

    Attributes:
        prompt: the question as the selector reads it; nothing of it is scored.
        choices: token ids of each possible answer.
        answer: index of the right one.
    """

    prompt: HeldOutExample
    choices: tuple[tuple[int, ...], ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class ChoiceAccuracy:
    """How often the right answer was the most likely one.

    Attributes:
        accuracy: by the log-likelihood of the whole answer.
        accuracy_per_token: by the log-likelihood a token, which does not favour short answers.
        chance: what guessing would give on average.
        num_questions: how many were asked.
    """

    accuracy: float
    accuracy_per_token: float
    chance: float
    num_questions: int


def load_questions(path: Path, tokenizer: ChatTokenizer, limit: int) -> list[Question]:
    """Return the first ``limit`` questions of a file whose prompts are short enough.

    Raises:
        DataError: the file cannot be read, a line is no question, or none fits. Lines with a
            prompt and a response that offer no choice are passed over.
    """
    questions: list[Question] = []
    bad = BadLines()
    for record in read_records(path, _check, bad):
        parsed = _choices_of(record)
        if parsed is None:
            bad.counts["no choice"] += 1
            continue
        choices, answer = parsed
        prompt_ids = chat_ids(tokenizer, question_of(record))
        if len(prompt_ids) > MAX_PROMPT_TOKENS:
            bad.counts["prompt too long"] += 1
            continue
        questions.append(
            Question(
                HeldOutExample(tuple(prompt_ids), len(prompt_ids), domain_of(path)),
                tuple(tuple(tokenizer.encode(c, add_special_tokens=False)) for c in choices),
                answer,
            )
        )
        if len(questions) == limit:
            break
    bad.warn(path)
    if not questions:
        raise DataError(f"{path} holds no multiple-choice question that fits")
    return questions


def choice_accuracy(
    model: nn.Module,
    questions: Sequence[Question],
    masks: UnitMasks | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ChoiceAccuracy:
    """Return how often the right answer is the most likely one. Evaluates.

    Args:
        model: the whole model.
        questions: what to ask.
        masks: of the questions' prompts.
        progress: called with (answers scored, all).
    """
    prompts: dict[HeldOutExample, HeldOutExample] = {}
    candidates: list[HeldOutExample] = []
    for number, question in enumerate(questions):
        for index, choice in enumerate(question.choices):
            candidate = HeldOutExample(
                token_ids=question.prompt.token_ids + choice,
                num_prompt_tokens=question.prompt.num_prompt_tokens,
                domain=f"{number}/{index}",  # evaluate() sums by domain: here, one answer each
            )
            candidates.append(candidate)
            prompts[candidate] = question.prompt
    scored = evaluate_cut(
        model, masks, candidates, progress=progress, selected_by=prompts.__getitem__
    )
    return _summarise(
        questions, {name: (q.cross_entropy, q.num_tokens) for name, q in scored.items()}
    )


def _summarise(
    questions: Sequence[Question], losses: Mapping[str, tuple[float, int]]
) -> ChoiceAccuracy:
    """Return the accuracies, from (nats a token, tokens) of each answer."""
    whole, per_token = [], []
    for number, question in enumerate(questions):
        answers = [losses[f"{number}/{index}"] for index in range(len(question.choices))]
        whole.append(int(np.argmin([loss * tokens for loss, tokens in answers])) == question.answer)
        per_token.append(int(np.argmin([loss for loss, _ in answers])) == question.answer)
    return ChoiceAccuracy(
        accuracy=float(np.mean(whole)),
        accuracy_per_token=float(np.mean(per_token)),
        chance=float(np.mean([1 / len(question.choices) for question in questions])),
        num_questions=len(questions),
    )


def _choices_of(record: dict[str, Any]) -> tuple[list[str], int] | None:
    if "choices" in record:
        return record["choices"], record["answer"]
    letters = [one or other for one, other in _OPTION.findall(record["prompt"])]
    response = record["response"].strip().removeprefix("####").strip()
    right = _LETTER.fullmatch(response)
    expected = [chr(ord("A") + index) for index in range(len(letters))]
    if right is None or len(letters) < 2 or letters != expected or right[1] not in letters:
        return None
    style = response.replace(right[1], "{}")
    return [style.format(letter) for letter in letters], letters.index(right[1])


def _check(record: dict[str, Any]) -> str | None:
    if not is_usable_text(record.get("prompt")):
        return "field 'prompt' is missing or empty"
    if "choices" not in record:
        return None if is_usable_text(record.get("response")) else "field 'choices' is missing"
    choices, answer = record["choices"], record.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(is_usable_text, choices)):
        return "field 'choices' is not a list of at least two texts"
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        return f"field 'answer' is not an index from 0 to {len(choices) - 1}"
    return None
