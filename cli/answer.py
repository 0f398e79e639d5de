"""An answer on its way to the user: streamed, stoppable, and kept as far as it came."""

import contextlib
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import Any

from ifp_mlx.cli.terminal import answer_console, shows_markdown


def stream_answer(pieces: Generator[str, None, None], write: Callable[[str], None]) -> bool:
    """Pass each piece of an answer on as it comes; return whether Ctrl-C ended it early.

    The generator is closed in that case, which keeps what was generated in the conversation.
    """
    with _ctrl_c_asks() as stop_wanted:
        try:
            for piece in pieces:
                write(piece)
                if stop_wanted():
                    return True
        finally:
            pieces.close()
        return stop_wanted()


@contextlib.contextmanager
def answer_writer(*, markdown: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows pieces of an answer on standard output.

    Args:
        markdown: render Markdown if standard output is a terminal that can redraw lines.
    """
    if markdown and shows_markdown():
        from ifp_mlx.cli.markdown_stream import MarkdownStream

        with _keys_not_echoed(), MarkdownStream(sys.stdout, answer_console()) as stream:
            yield stream.write
        return

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    with _keys_not_echoed():
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


@contextlib.contextmanager
def _keys_not_echoed() -> Iterator[None]:
    """Keep keys that are pressed during the answer from appearing in the middle of it."""
    saved: list[Any] | None = None
    try:
        import termios

        if sys.stdin.isatty() and sys.stdout.isatty():
            saved = termios.tcgetattr(sys.stdin)
            quiet = termios.tcgetattr(sys.stdin)
            quiet[3] &= ~termios.ECHO
            termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    except ImportError:
        pass  # no termios on this platform: keys are echoed
    try:
        yield
    finally:
        if saved is not None:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, saved)
