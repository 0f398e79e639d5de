"""An answer on its way to the user: streamed, stoppable, and kept as far as it came."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from ifp_mlx.cli.terminal import answer_console, shows_markdown


def stream_answer(pieces: Iterator[str], write: Callable[[str], None]) -> bool:
    """Pass each piece of an answer on as it comes; return whether Ctrl-C ended it early.

    The iterator is closed in that case, which keeps what was generated in the conversation.
    """
    close = getattr(pieces, "close", lambda: None)
    with _ctrl_c_asks() as stop_wanted:
        try:
            for piece in pieces:
                write(piece)
                if stop_wanted():
                    return True
        finally:
            close()
        return stop_wanted()


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
def _ctrl_c_asks() -> Iterator[Callable[[], bool]]:
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
