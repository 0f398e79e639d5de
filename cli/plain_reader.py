"""Reading messages without a line editor: from a pipe, or on a terminal that has no cursor."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Protocol

from ifp_mlx.cli.prompts import decode_input

PROMPT, CONTINUATION = "› ", "· "
_QUOTES = '"""'


class Reader(Protocol):
    """Where messages come from."""

    def read(self, draft: str = "") -> str:
        """Return the next message.

        Args:
            draft: text to begin with, for the user to change.

        Raises:
            EOFError: there is no more.
            KeyboardInterrupt: Ctrl-C was pressed.
        """

    def ask(self, question: str, choices: Sequence[str]) -> str:
        """Return the user's choice, one of the first letters.

        Raises:
            EOFError: nobody is there to answer.
        """


def is_unfinished(text: str) -> bool:
    """Return whether a message has opened a triple-quoted block and not closed it."""
    return text.lstrip().startswith(_QUOTES) and text.count(_QUOTES) < 2


def without_quotes(text: str) -> str:
    """Return a message without the triple quotes around it."""
    stripped = text.strip()
    if stripped.startswith(_QUOTES):
        return stripped.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")
    return text


class PlainReader:
    """Lines from a pipe or a terminal without cursor control; triple quotes join several.

    Args:
        prompt: shown on standard error before each message; empty for none.
    """

    def __init__(self, prompt: str = ""):
        self._prompt = prompt

    def read(self, draft: str = "") -> str:
        """Return the next message that is not blank."""
        text = self._read_line(self._prompt)
        while not text.strip():
            text = self._read_line(self._prompt)
        while is_unfinished(text):
            try:
                text = f"{text}\n{self._read_line(CONTINUATION if self._prompt else '')}"
            except EOFError:
                break
        return without_quotes(text)

    def ask(self, question: str, choices: Sequence[str]) -> str:
        """Return the first letter of the user's choice; a pipe has nobody to ask."""
        if not self._prompt:
            raise EOFError
        while True:
            answer = self._read_line(f"{question} {', '.join(choices)}: ").strip().lower()
            if answer[:1] in [choice[0] for choice in choices]:
                return answer[0]

    def _read_line(self, prompt: str) -> str:
        with contextlib.suppress(OSError):  # messages are read all the same
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decode_input(line, " of a line").rstrip("\r\n")
