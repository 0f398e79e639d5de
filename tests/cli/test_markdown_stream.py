import io
import random

import pyte
import pytest
from rich.console import Console

from ifp_mlx.cli.markdown_stream import MarkdownStream, split_blocks

TEXT = """# A heading

A **bold** paragraph with `code` that is long enough to wrap on a narrow terminal, surely.

```python
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)

# a comment
for number in range(30):
    print(number, fib(number))
```

1. first
2. second, with a text that wraps around the end of the line on a narrow screen
   - nested
3. third

| name | value |
|------|-------|
| a    | 1     |
| a longer one | 22222 |

> a quote

The end.
"""


def screen_after(pieces: list[str], *, columns: int, rows: int) -> list[str]:
    """Return the lines of a terminal, with its history, after the pieces were written."""
    file = io.StringIO()
    console = Console(width=columns, height=rows, force_terminal=True)
    with MarkdownStream(file, console) as stream:
        for piece in pieces:
            stream._next_draw = 0.0  # draw every time: the most that can go wrong
            stream.write(piece)
    screen = pyte.HistoryScreen(columns, rows, history=500, ratio=0.5)
    screen.set_mode(pyte.modes.LNM)
    pyte.Stream(screen).feed(file.getvalue())
    above = ["".join(row[c].data for c in range(columns)) for row in screen.history.top]
    return [line.rstrip() for line in [*above, *screen.display]]


def cut(text: str, seed: int) -> list[str]:
    """Cut a text in random pieces of 1 to 9 characters."""
    generator, pieces = random.Random(seed), []
    while text:
        length = generator.randint(1, 9)
        pieces.append(text[:length])
        text = text[length:]
    return pieces


def without_end(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines = lines[:-1]
    return lines


@pytest.mark.parametrize("columns", [100, 40, 24])
@pytest.mark.parametrize("rows", [50, 14])
def test_markdown_in_pieces_looks_like_markdown_at_once(columns: int, rows: int) -> None:
    at_once = without_end(screen_after([TEXT], columns=columns, rows=rows))
    for seed in range(2):
        pieces = cut(TEXT, seed)
        assert without_end(screen_after(pieces, columns=columns, rows=rows)) == at_once
    assert max(len(line) for line in at_once) < columns


@pytest.mark.parametrize("seed", [0, 1])
def test_markdown_leaves_the_lines_of_an_answer_as_they_are(seed: int) -> None:
    text = (
        "def __init__(self, *a):\n    self.a = 1\n    if a:\n        self.b = a\n\n"
        "    return None\n\nx = 1\nprint(x)\n\nOld pond\na frog leaps in\n\n* an item\n  goes on\n"
    )
    shown = [line for line in screen_after(cut(text, seed), columns=60, rows=40) if line]
    written = [line for line in text.splitlines() if line]
    assert shown[:-2] == written[:-2]
    assert [line.strip(" •") for line in shown[-2:]] == ["an item", "goes on"]


def test_markdown_rewrites_only_lines_that_changed() -> None:
    file = io.StringIO()
    console = Console(width=80, height=40, force_terminal=True, color_system=None)
    with MarkdownStream(file, console) as stream:
        for number in range(20):
            stream._next_draw = 0.0
            stream.write(f"- item number {number}\n")
    assert file.getvalue().count("item number 0") == 1
    assert file.getvalue().count("item number 10") <= 2


def test_markdown_of_an_empty_answer_prints_nothing_visible() -> None:
    assert without_end(screen_after([], columns=40, rows=10)) == []


def test_split_blocks_keeps_every_character() -> None:
    assert "".join(split_blocks(TEXT)) == TEXT
    assert len(split_blocks(TEXT)) == 7
    assert split_blocks("") == []


@pytest.mark.parametrize(
    "text", ["\n", " \n\n", "\n\ntext", "[a]: http://b.c\n", "\n```", "a\x0cb\u2028c"]
)
def test_split_blocks_takes_texts_without_a_block(text: str) -> None:
    assert split_blocks(text) == [text]
