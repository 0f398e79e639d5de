"""Reading what the user types: a line editor on a terminal, plain lines from a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, has_focus, is_searching
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

from ifp_mlx.errors import UsageError

_QUOTES = '"""'
_PROMPT, _CONTINUATION = "› ", "· "
_STYLE = Style.from_dict(
    {"prompt": "bold ansicyan", "continuation": "ansibrightblack", "bottom-toolbar": "noreverse"}
)


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


class CommandCompleter(Completer):
    """Completes slash commands and what follows them.

    Args:
        commands: name with slash -> one line of help.
        arguments: returns the values that may follow a command.
    """

    def __init__(self, commands: dict[str, str], arguments: Callable[[str], Iterable[str]]):
        self._commands = commands
        self._arguments = arguments

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """Yield what can stand at the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text.partition(" ")
        if not space:
            for command, help_line in self._commands.items():
                if command.startswith(name):
                    yield Completion(command, -len(name), display_meta=help_line)
            return
        for value in self._arguments(name):
            if value.lower().startswith(argument.lower()):
                yield Completion(value, -len(argument))


def is_unfinished(text: str) -> bool:
    """Return whether a message has opened a triple-quoted block and not closed it."""
    return text.lstrip().startswith(_QUOTES) and text.count(_QUOTES) < 2


def without_quotes(text: str) -> str:
    """Return a message without the triple quotes around it."""
    stripped = text.strip()
    if stripped.startswith(_QUOTES):
        return stripped.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")
    return text


class LineEditor:
    """A line with history, search, completion, several lines and the user's own editor.

    Args:
        history: the file that keeps what was typed, readable by its owner only.
        completer: completes slash commands.
        toolbar: returns the line at the bottom of the screen.
    """

    def __init__(self, history: Path, completer: Completer, toolbar: Callable[[], str]):
        history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(history, os.O_CREAT | os.O_APPEND, 0o600))
        output = create_output(sys.stdout if sys.stdout.isatty() else sys.stderr)
        types_command = Condition(lambda: get_app().current_buffer.text.startswith("/"))
        self._session: PromptSession[str] = PromptSession(
            message=[("class:prompt", _PROMPT)],
            history=FileHistory(str(history)),
            completer=completer,
            complete_while_typing=types_command,
            enable_history_search=~types_command,
            multiline=True,
            prompt_continuation=_continuation,
            key_bindings=_key_bindings(),
            bottom_toolbar=lambda: [("class:bottom-toolbar ansibrightblack", toolbar())],
            style=_STYLE,
            tempfile_suffix=".md",
            reserve_space_for_menu=6,
            output=output,
        )

    def read(self, draft: str = "") -> str:
        """Return the next message."""
        return without_quotes(self._session.prompt(default=draft))

    def ask(self, question: str, choices: Sequence[str]) -> str:
        """Return the first letter of the user's choice."""
        letters = [choice[0] for choice in choices]
        session: PromptSession[str] = PromptSession(output=self._session.output)
        while True:
            answer = session.prompt(f"{question} {', '.join(choices)}: ").strip().lower()
            if answer[:1] in letters:
                return answer[0]


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
                text = f"{text}\n{self._read_line(_CONTINUATION if self._prompt else '')}"
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
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        try:
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"standard input is not UTF-8 text (byte {error.start} of a line); convert it "
                "first, for example with iconv -t UTF-8"
            ) from error


def _continuation(width: int, line_number: int, is_soft_wrap: int) -> StyleAndTextTuples:
    return [("class:continuation", " " * width if is_soft_wrap else _CONTINUATION)]


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()
    typing = has_focus("DEFAULT_BUFFER") & ~is_searching

    @bindings.add("enter", filter=typing)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_unfinished(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=typing)
    @bindings.add("c-j", filter=typing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @bindings.add("c-c", filter=typing & Condition(lambda: bool(get_app().current_buffer.text)))
    def _discard(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    @bindings.add("c-g", filter=typing)
    def _edit(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return bindings
