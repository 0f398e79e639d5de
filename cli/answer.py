"""An answer on its way to the user: streamed, stoppable, and kept as far as it came."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from ifp_mlx.cli.prompt_progress import PromptProgress
from ifp_mlx.cli.terminal import answer_console, shows_markdown

OnRead = Callable[[int, int], None]
"""Takes the tokens of the prompt that are read, and how many there are."""


def stream_answer(begin: Callable[[OnRead], Iterator[str]], write: Callable[[str], None]) -> bool:
    """Pass each piece of an answer on as it comes; return whether Ctrl-C ended it early.

    Until the first piece, how much of the prompt is read is shown on a terminal. The iterator is
    closed in the end, which keeps what was read and generated in the conversation.

    Args:
        begin: takes what is to be told how much of the prompt is read, returns the answer.
        write: takes the pieces.
    """
    with ctrl_c_asks() as stop_wanted, PromptProgress() as progress:

        def on_read(done: int, total: int) -> None:
            if stop_wanted():
                raise _Stopped
            progress.show(done, total)

        pieces = begin(on_read)
        close = getattr(pieces, "close", lambda: None)
        try:
            for piece in pieces:
                write(piece)
                if stop_wanted():
                    return True
        except _Stopped:
            return True
        finally:
            close()
        return stop_wanted()


class _Stopped(Exception):
    """Ctrl-C was pressed while the prompt was read."""


@contextlib.contextmanager
def answer_writer(*, markdown: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows pieces of an answer on standard output.

    Args:
        markdown: render Markdown if standard output is a terminal that can redraw lines.
    """
    if markdown and shows_markdown():
        from ifp_mlx.cli.markdown_stream import MarkdownStream

        with MarkdownStream(sys.stdout, answer_console()) as stream:
            yield stream.write
        return

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    yield write
    write("\n")


@contextlib.contextmanager
def ctrl_c_asks() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C sets a flag, so that no step is torn; a second one raises.

    Yields:
        A function that tells whether Ctrl-C was pressed.
    """
    pressed = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
