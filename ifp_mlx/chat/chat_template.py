"""What a model's chat template makes of messages: token ids, up to where the answer begins."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.notices import warn_once

Message = Mapping[str, Any]

_SYSTEM = "the chat template takes no system message; it is put in front of the first user message"
_ALTERNATE = "the chat template takes turns only; messages of one role in a row are joined"


class ChatTokenizer(Protocol):
    """What is used of an mlx-lm or transformers tokenizer."""

    eos_token_id: int
    chat_template: Any

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]:
        """Return the ids of a text."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Return the ids of a conversation."""


def chat_ids(
    tokenizer: ChatTokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[int]:
    """Return a conversation's ids up to where the assistant's next answer begins.

    Without a chat template the contents stand there as paragraphs.

    Args:
        tokenizer: of the model.
        messages: the conversation; what the template refuses of it, ``accepted_messages`` changes.
        add_generation_prompt: end with what begins an answer.

    Raises:
        CheckpointError: the chat template is broken, or refuses the messages all the same.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer.encode("\n\n".join(message["content"] for message in messages)))
    return _apply(tokenizer, messages, add_generation_prompt)[1]


def accepted_messages(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> list[Message]:
    """Return a conversation in the form that the chat template takes.

    A system message that it refuses becomes the beginning of the first user message; if it wants
    turns, neighbours of one role are joined. Either is logged once.

    Raises:
        CheckpointError: the chat template is broken, or refuses the messages all the same.
    """
    if tokenizer.chat_template is None:
        return list(messages)
    return _apply(tokenizer, messages, add_generation_prompt=True)[0]


def try_chat_template(tokenizer: ChatTokenizer) -> str | None:
    """Return why a chat template cannot be used for the simplest of conversations, or None."""
    try:
        chat_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    except CheckpointError as error:
        return str(error)
    return None


def _apply(
    tokenizer: ChatTokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[list[Message], list[int]]:
    """Return the first form of a conversation that the chat template takes, and its ids."""
    refused: Exception | None = None
    for form, what_was_done in [(list(messages), ""), *_changes(messages)]:
        try:
            ids = tokenizer.apply_chat_template(
                form, add_generation_prompt=add_generation_prompt, return_dict=False
            )
            ids = [int(token) for token in ids]
        except Exception as error:  # a template is a program: it raises anything
            refused = refused or error  # what it says of the messages as they are is told
            continue
        if what_was_done:
            warn_once(what_was_done)
        return form, ids
    raise CheckpointError(_told(tokenizer, refused)) from refused


def _changes(messages: Sequence[Message]) -> list[tuple[list[Message], str]]:
    """Return other forms of a conversation that say the same, and what was done to it."""
    folded = _with_system_folded(messages)
    joined, both = _joined(messages), _joined(folded)
    found = [(folded, _SYSTEM), (joined, _ALTERNATE), (both, f"{_SYSTEM}; {_ALTERNATE}")]
    return [(change, what) for change, what in found if change != list(messages)]


def _with_system_folded(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation whose system messages are the beginning of its first user message."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    for index, message in enumerate(rest):
        if message["role"] == "user":
            content = "\n\n".join([*system, message["content"]])
            return [*rest[:index], {**message, "content": content}, *rest[index + 1 :]]
    return [{"role": "user", "content": "\n\n".join(system)}, *rest] if system else rest


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation in which no two neighbours have the same role."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            content = f"{joined[-1]['content']}\n\n{message['content']}"
            joined[-1] = {**joined[-1], "content": content}
        else:
            joined.append(message)
    return joined


def _told(tokenizer: ChatTokenizer, error: Exception | None) -> str:
    folder = getattr(tokenizer, "name_or_path", "")
    if isinstance(tokenizer.chat_template, dict):
        names = ", ".join(sorted(tokenizer.chat_template))
        return (
            f"{folder}: it has the chat templates {names} but none named default; rename one of "
            "them in tokenizer_config.json"
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    line = getattr(error, "lineno", None)
    where = "" if line is None else f", line {line}"
    return (
        f"{folder}: its chat template cannot be used ({reason}{where}); correct chat_template, or "
        "continue plain text with `ignore_chat_template`"
    )
