"""What the terminal is, and the two streams: answers to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ifp_mlx.cli.flag_names import in_flags
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:  # Rich takes longer to import than a shell completion may take
    from rich.console import Console

_TITLE_CHARACTERS = 60


def prepare_streams() -> None:
    """Make the standard streams usable, whatever this process was started with.

    One that is closed becomes the null device, before a file that is opened takes its number. What
    the encoding of standard output does not have is replaced: an answer goes on.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if not is_first_machine():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def is_first_machine() -> bool:
    """Return whether this process speaks: of those that ``mlx.launch`` starts together, one does.

    Errors come from all of them: what is missing on one machine is said by that one.
    """
    return os.environ.get("MLX_RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Return whether ``mlx.launch`` started this process."""
    return "MLX_RANK" in os.environ


def refuse_several_machines(command: str) -> None:
    """Refuse a command that listens to somebody where ``mlx.launch`` started several of it.

    Raises:
        UsageError: it did.
    """
    if is_one_of_several():
        raise UsageError(
            f"ifp {command} runs on one machine; write the sub-network with ifp export and give it "
            "to mlx_lm.server or mlx_lm.chat under mlx.launch (ifp generate runs there itself)"
        )


def status_console() -> Console:
    """Return a console on standard error: status lines, progress, tables for people."""
    from rich.console import Console

    # Lines are wrapped for people; a log keeps one line a message.
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def answer_console() -> Console:
    """Return a console on standard output."""
    from rich.console import Console

    return Console(highlight=False)


def complain(message: str) -> None:
    """Print one error line, in which parameters of the library are flags."""
    with contextlib.suppress(OSError):  # nobody can be told
        status_console().print(f"[red]ifp:[/red] {_escape(in_flags(message))}")


def say(message: str) -> None:
    """Print one status line, dimmed, on standard error; one that cannot be is no reason to stop."""
    if not is_first_machine():
        return
    with contextlib.suppress(OSError):
        if not _is_styled():
            sys.stderr.write(f"{message}\n")
            return
        console = status_console()
        console.print(broken_between_facts(message, console.width), style="dim", markup=False)


def broken_between_facts(message: str, width: int) -> str:
    """Return a message whose lines fit a width, broken after commas, colons and semicolons.

    A fact that is longer than the width stays as it is.
    """
    lines: list[str] = []
    for line in message.split("\n"):
        lines.append("")
        for fact in re.split(r"(?<=[,:;]) ", line):
            longer = f"{lines[-1]} {fact}" if lines[-1] else fact
            if len(longer) <= width or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(fact)
    return "\n".join(lines)


def print_json(value: Any) -> None:
    """Print one JSON document on standard output, for machines."""
    import json

    takes_all = "utf" in (sys.stdout.encoding or "").lower()
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=not takes_all) + "\n")


def is_interactive() -> bool:
    """Return whether a person sits at both ends: a line editor makes sense."""
    return sys.stdin.isatty() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def shows_markdown() -> bool:
    """Return whether standard output is a terminal that can redraw lines."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


@contextlib.contextmanager
def working(message: str) -> Iterator[None]:
    """Show a spinner on standard error while the block runs; nothing if that is no terminal."""
    console = status_console() if _is_styled() else None
    if console is None or not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    with console.status(_escape(message), spinner="dots"):
        yield


@contextlib.contextmanager
def keys_kept_for_the_prompt() -> Iterator[None]:
    """Keep what is typed while nobody reads from the screen, and whole for the next prompt.

    Without this, keys pressed during an answer appear in the middle of it, and the terminal hands
    Enter on as a line feed, which a line editor cannot tell from Ctrl-J.
    """
    try:
        import termios
    except ImportError:  # no such terminals on this platform
        yield
        return
    saved = termios.tcgetattr(sys.stdin)
    changed = termios.tcgetattr(sys.stdin)
    changed[0] &= ~termios.ICRNL
    changed[3] &= ~(termios.ECHO | termios.ICANON)  # not ISIG: Ctrl-C stays a signal
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)


def plural(count: int, noun: str) -> str:
    """Return ``1 token``, ``2 tokens``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def title(text: str | None) -> str:
    """Return a text as one short line."""
    line = " ".join((text or "").split())
    return line if len(line) <= _TITLE_CHARACTERS else f"{line[: _TITLE_CHARACTERS - 1]}…"


def gigabytes(num_bytes: float) -> str:
    """Return bytes as a person reads them, 1 GB = 1e9 bytes."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def part_of_bytes(part: float, whole: float) -> str:
    """Return two amounts of bytes in one unit, as in ``486 of 540 MB``."""
    unit, name = (1e9, "GB") if whole >= 1e9 else (1e6, "MB")
    digits = 2 if name == "GB" else 0 if whole >= 1e8 else 1
    return f"{part / unit:.{digits}f} of {whole / unit:.{digits}f} {name}"


def duration(seconds: float) -> str:
    """Return seconds as a person reads them: ``34 ms``, ``1.2 s``."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _is_styled() -> bool:
    """Return whether standard error may show more than plain lines, which need no Rich."""
    return sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR"))


def _escape(message: str) -> str:
    from rich.markup import escape

    return escape(message)
