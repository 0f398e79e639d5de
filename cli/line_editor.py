"""The line editor of a chat: history, search, completion, several lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

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

from ifp_mlx.cli.plain_reader import CONTINUATION, PROMPT, is_unfinished, without_quotes

_PLAIN, _CHOSEN = "bg:default fg:default", "bg:default fg:default reverse"
"""The terminal's own colours, which are readable whatever they are."""

_STYLE = Style.from_dict(
    {
        "prompt": "bold ansicyan",
        "continuation": "ansibrightblack",
        "bottom-toolbar": "noreverse",
        "completion-menu": _PLAIN,
        "completion-menu.completion": _PLAIN,
        "completion-menu.completion.current": _CHOSEN,
        "completion-menu.meta.completion": _PLAIN,
        "completion-menu.meta.completion.current": _CHOSEN,
        "scrollbar.background": _PLAIN,
        "scrollbar.button": _CHOSEN,
    }
)


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
            message=[("class:prompt", PROMPT)],
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


def _continuation(width: int, line_number: int, is_soft_wrap: int) -> StyleAndTextTuples:
    return [("class:continuation", " " * width if is_soft_wrap else CONTINUATION)]


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
