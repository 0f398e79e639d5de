"""Items, conversations, and the token ids that a model reads of them.

An item is a conversation of one or more turns. A turn adds messages (worked examples, a document,
a question); the model answers; a judge looks at the answer. Instruction-tuned models read messages
through their chat template, base models as plain text of questions and answers.
"""

import dataclasses
import re
from typing import Any, Literal, Protocol

from judges import Judge

Role = Literal["user", "assistant", "text"]
"""``text`` stands alone: it is continued as it is, without any template."""

_ANSWER = "\u241aanswer\u241a"
"""Stands for an answer while a template is rendered; no text holds it."""

_NEXT_QUESTION = re.compile(r"\n+\s*Question:")


class Tokenizer(Protocol):
    """What is used of mlx-lm's tokenizer."""

    chat_template: Any
    eos_token_ids: Any

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return token ids."""

    def decode(self, ids: Any) -> str:
        """Return text."""

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """Return the messages as a model reads them."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """What is said before the model answers, and what a right answer is.

    Attributes:
        messages: the last is the user's; earlier ones are pasted: worked examples, a history.
        judge: None where the answer is not judged.
        reference: a right answer, word for word, for teacher-forced figures; "" if there is none.
    """

    messages: tuple[Message, ...]
    judge: Judge | None
    reference: str = ""


@dataclasses.dataclass(frozen=True)
class Item:
    """One conversation of a function set; ``name`` is unique within the set."""

    name: str
    turns: tuple[Turn, ...]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model reads before it answers in one turn.

    Attributes:
        ids: token ids; of a later turn, those after the answer to the turn before.
        last_message: where in ``ids`` the last message begins.
    """

    ids: tuple[int, ...]
    last_message: int


def is_chat_model(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(tokenizer.chat_template)


def question(text: str) -> tuple[Message, ...]:
    """Return a turn's messages that are one question."""
    return (Message("user", text),)


def prompts_of(item: Item, tokenizer: Tokenizer) -> list[Prompt]:
    """Return the prompt of each turn of an item.

    Later prompts begin where an answer ends: with the end-of-message marker, which the model that
    wrote the answer was not shown.
    """
    first = item.turns[0].messages
    if first[0].role == "text":
        return [Prompt(tuple(tokenizer.encode(first[0].content)), 0)]
    if not is_chat_model(tokenizer):
        if len(item.turns) > 1:
            raise ValueError(f"{item.name}: a base model has no conversation of several turns")
        text = "".join(_plain(message) for message in first)
        before = "".join(_plain(message) for message in first[:-1])
        ids = tokenizer.encode(text)
        return [Prompt(tuple(ids), _common_length(ids, tokenizer.encode(before)))]
    prompts = []
    history: list[dict[str, str]] = []
    for turn in item.turns:
        history += [{"role": m.role, "content": m.content} for m in turn.messages]
        text = _render(tokenizer, history)
        ids = tokenizer.encode(text, add_special_tokens=False)
        start = 0
        if len(turn.messages) > 1:
            before = tokenizer.apply_chat_template(history[:-1], tokenize=False)
            start = _common_length(ids, tokenizer.encode(before, add_special_tokens=False))
        prompts.append(Prompt(tuple(ids), start))
        history.append({"role": "assistant", "content": _ANSWER})
    return prompts


def answer_text(ids: list[int], tokenizer: Tokenizer) -> str:
    """Return the text of generated ids; a base model's ends where it asks the next question."""
    text = tokenizer.decode([token for token in ids if token not in tokenizer.eos_token_ids])
    return text if is_chat_model(tokenizer) else _NEXT_QUESTION.split(text)[0]


def answer_ids(answer: str, item: Item, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of a reference answer as the model would write it, end of message included."""
    if item.turns[0].messages[0].role == "text":
        return tuple(tokenizer.encode(answer, add_special_tokens=False))
    if not is_chat_model(tokenizer):
        return tuple(tokenizer.encode(" " + answer + "\n", add_special_tokens=False))
    ids = tokenizer.encode(answer, add_special_tokens=False)
    end = tokenizer.encode(_after_answer(tokenizer), add_special_tokens=False)[0]
    return (*ids, end)


def _render(tokenizer: Tokenizer, history: list[dict[str, str]]) -> str:
    """Return a conversation up to the next answer, from the end of the answer before it."""
    text: str = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    return text.rsplit(_ANSWER, 1)[-1]


def _after_answer(tokenizer: Tokenizer) -> str:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return text.rsplit(_ANSWER, 1)[-1]


def _plain(message: Message) -> str:
    if message.role == "user":
        return f"Question: {message.content}\nAnswer:"
    return f" {message.content}\n\n"


def _common_length(a: list[int], b: list[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
