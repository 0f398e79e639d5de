"""Where a prompt comes from: the command line, a pipe, or both."""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.answer import OnRead
from ifp_mlx.cli.help_sections import ADVANCED
from ifp_mlx.cli.terminal import say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.chat.conversation import Conversation
    from ifp_mlx.chat.sampling import SamplingOptions


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """What is put around the prompt."""

    system_prompt: options.SystemPrompt = None
    ignore_chat_template: Annotated[
        bool,
        typer.Option(
            "--ignore-chat-template",
            "--raw",
            help="Continue the prompt as it is, without the chat template.",
            rich_help_panel=ADVANCED,
        ),
    ] = False

    def __post_init__(self) -> None:
        """Refuse flags that exclude each other."""
        if self.ignore_chat_template and self.system_prompt is not None:
            raise UsageError(
                "--system-prompt needs the chat template; leave out --ignore-chat-template"
            )

    def messages(self, text: str) -> list[dict[str, str]]:
        """Return the conversation that a prompt begins."""
        messages = [{"role": "user", "content": text}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages

    def ids(self, assistant: Assistant, text: str) -> list[int]:
        """Return the tokens that the model reads for a prompt."""
        from ifp_mlx.chat.chat_template import chat_ids

        if self.ignore_chat_template:
            return list(assistant.tokenizer.encode(text))
        return chat_ids(assistant.tokenizer, self.messages(text))

    def answer(
        self,
        conversation: Conversation,
        text: str,
        sampling: SamplingOptions,
        on_read: OnRead | None = None,
    ) -> Iterator[str]:
        """Stream the answer to a prompt, or its continuation."""
        if self.ignore_chat_template:
            return conversation.complete(text, sampling, on_read)
        return conversation.reply(self.messages(text), sampling, on_read)


def read_prompt(words: Sequence[str]) -> str:
    """Return the prompt: the words of the command line, in which ``-`` stands for standard input.

    Without any it is what is piped in. Otherwise standard input is left to whoever reads it, such
    as the loop that this is called in.

    Raises:
        UsageError: there is none, or the input is no UTF-8 text.
    """
    if not words and not _is_piped():
        raise UsageError("no prompt; give one, or - to read standard input")
    parts = [word for word in words if word != "-"]
    text = " ".join(parts)
    if "-" in words or not words:
        piped = read_stdin()
        text = f"{text}\n\n{piped}" if parts and piped.strip() else text or piped
    elif _is_piped():
        say("standard input was not read; a - after the prompt adds it")
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def read_stdin() -> str:
    """Return all of standard input.

    Raises:
        UsageError: it is no UTF-8 text.
    """
    return decode_input(sys.stdin.buffer.read()).rstrip("\n")


def decode_input(content: bytes, where: str = "", *, source: str = "standard input") -> str:
    """Return bytes of an input as text; ``where`` completes the message: " of a line".

    Raises:
        UsageError: they are no UTF-8 text.
    """
    try:
        return content.decode("utf-8-sig")  # some pipes begin with a mark
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source} is not UTF-8 text (byte {error.start}{where}); convert it first, "
            "for example with iconv -t UTF-8"
        ) from error


def _is_piped() -> bool:
    # Not just "no terminal": reading a device that nobody writes to would wait for ever.
    mode = os.fstat(sys.stdin.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
