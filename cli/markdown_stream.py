"""Markdown that appears while it is being written.

Everything that further text cannot change any more is printed once and scrolls away like
ordinary output. Only the unfinished end of the reply, never more than a screen, is redrawn in
place, and of that only the lines that differ: nothing flickers and long replies scroll properly.
"""

import io
import re
import time
from typing import TextIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.syntax import Syntax

_REDRAW_INTERVAL_S = 0.08
_SYNTAX_THEME = "ansi_dark"  # the terminal's own colours fit light and dark backgrounds
_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_CLEAR_LINE, _CLEAR_BELOW = "\x1b[K", "\x1b[J"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class _PlainCode(CodeBlock):
    """Code without a background or padding, so that it can be copied from the screen."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _code(str(self.text).rstrip(), self.lexer_name)


class _LeftHeading(Heading):
    """A heading at the left margin: a box around it would look odd in a chat."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heading = self.text.copy()
        heading.justify = "left"
        heading.stylize("bold")
        if self.tag == "h1":
            heading.stylize("underline")
        yield heading


def _code(text: str, language: str) -> Syntax:
    return Syntax(text, language, theme=_SYNTAX_THEME, word_wrap=True, background_color="default")


class ChatMarkdown(Markdown):
    """Rich's Markdown with plain code blocks and plain headings, and with lines as they are.

    A model that ends a line means it: verses and code without a fence are no flowing text.
    """

    elements = {  # noqa: RUF012 - the base class declares it
        **Markdown.elements,
        "fence": _PlainCode,
        "code_block": _PlainCode,
        "heading_open": _LeftHeading,
    }

    def __init__(self, markup: str):
        super().__init__(markup, code_theme=_SYNTAX_THEME)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


# Lines as the parser counts them; str.splitlines knows more kinds.
_LINES = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
_parser = MarkdownIt().enable("table")


def split_blocks(text: str) -> list[str]:
    """Return the top-level blocks of a Markdown text; only the last one may still grow."""
    starts = [token.map[0] for token in _parser.parse(text) if token.level == 0 and token.map]
    if not text:
        return []
    starts[:1] = [0]  # blank lines at the beginning, or nothing but them, are of the first block
    lines = _LINES.findall(text)
    return [
        "".join(lines[start:end])
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)
    ]


def _is_table(block: str) -> bool:
    return block.lstrip().startswith("|")


def _is_unfenced_code(block: str) -> bool:
    """Return whether Markdown would take the indentation away that a block was written with."""
    tokens = _parser.parse(block)
    if tokens and tokens[0].type == "paragraph_open":
        return any(line.startswith(("  ", "\t")) for line in block.strip("\r\n").splitlines()[1:])
    return bool(tokens) and tokens[0].type == "code_block"


class MarkdownStream:
    """Prints a growing Markdown text to a terminal.

    Use it as a context manager; ``write`` pieces, the rest is drawn when the block ends.
    """

    def __init__(self, file: TextIO, console: Console):
        self._file = file
        self._console = console
        self._pending = ""  # Markdown of the unfinished blocks
        self._scrolled = 0  # rendered lines of it that are printed for good
        self._tail: list[str] = []  # rendered lines of it on the screen, redrawn in place
        self._first_block = True
        self._width = console.width
        self._next_draw = 0.0

    def __enter__(self) -> "MarkdownStream":
        self._file.write(_HIDE_CURSOR)
        self._file.flush()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._draw(final=True)
        finally:
            self._file.write(_SHOW_CURSOR)
            self._file.flush()

    def write(self, text: str) -> None:
        """Add text; it is drawn a few times a second at most."""
        self._pending += text
        begin = time.monotonic()
        if begin >= self._next_draw:
            self._draw()
            end = time.monotonic()
            # A paragraph without end takes ever longer to render: never most of the time.
            self._next_draw = end + max(_REDRAW_INTERVAL_S, 4 * (end - begin))

    def _draw(self, *, final: bool = False) -> None:
        if self._console.width != self._width:
            # The terminal has rewrapped what is on it: leave that alone, draw below it.
            self._width, self._tail, self._scrolled = self._console.width, [], 0
        blocks = split_blocks(self._pending)
        growing = "" if final or not blocks else blocks.pop()
        for block in blocks:
            lines = [*self._gap(), *self._render(block)][self._scrolled :]
            self._redraw(lines, num_final=len(lines))
            self._scrolled, self._first_block = 0, False
        self._pending = growing
        if growing:
            self._draw_growing(growing)

    def _draw_growing(self, block: str) -> None:
        lines = [*self._gap(), *self._render(block)][self._scrolled :]
        room = max(self._console.height - 2, 4)
        if len(lines) <= room:
            self._redraw(lines, num_final=0)
        elif _is_table(block):
            # Column widths change with each row: nothing of a table is final before its end.
            self._redraw(lines[-room:], num_final=0)
        else:
            # Code, lists and paragraphs grow at their end: what is well above it is final.
            committed = len(lines) - room // 2
            self._redraw(lines, num_final=committed)
            self._scrolled += committed

    def _gap(self) -> list[str]:
        return [] if self._first_block else [""]

    def _render(self, markdown: str) -> list[str]:
        # The column at the right edge stays free: terminals differ in when they wrap there.
        width = max(self._console.width - 1, 10)
        buffer = io.StringIO()
        console = Console(
            file=buffer,
            width=width,
            force_terminal=True,
            color_system=self._console.color_system,  # type: ignore[arg-type]
            no_color=self._console.no_color,
            legacy_windows=False,
            highlight=False,
        )
        if _is_unfenced_code(markdown):
            console.print(_code(markdown.strip("\r\n"), "text"))
        else:
            console.print(ChatMarkdown(markdown))
        lines = [line.rstrip() for line in buffer.getvalue().split("\n")]
        blank = [not _ESCAPES.sub("", line).strip() for line in lines]
        while blank and blank[-1]:
            blank.pop()
        first = blank.index(False) if False in blank else len(blank)
        return lines[first : len(blank)]

    def _redraw(self, lines: list[str], num_final: int) -> None:
        """Show ``lines`` in the place of the tail; the first ``num_final`` are left for good."""
        same = 0
        while same < min(len(lines), len(self._tail)) and lines[same] == self._tail[same]:
            same += 1
        if same < max(len(lines), len(self._tail)):
            up = len(self._tail) - same
            parts = [f"\x1b[{up}A" if up else "", "\r"]
            parts += [f"{line}{_CLEAR_LINE}\n" for line in lines[same:]]
            if len(lines) < len(self._tail):
                parts.append(_CLEAR_BELOW)
            self._file.write("".join(parts))
            self._file.flush()
        self._tail = lines[num_final:]
