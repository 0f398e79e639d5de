"""A terminal in memory: runs a program on a pseudo-terminal and keeps its screen."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pyte

TIMEOUT_S = 60.0
_NOT_INHERITED = ("NO_COLOR", "COLUMNS", "LINES")
KEYS = {
    "Enter": "\r",
    "Up": "\x1b[A",
    "Ctrl-C": "\x03",
    "Ctrl-D": "\x04",
    "Ctrl-G": "\x07",
    "Ctrl-R": "\x12",
    "Alt-Enter": "\x1b\r",
    "Tab": "\t",
}


class Terminal:
    """What a person would see and type.

    Args:
        arguments: of ``ifp``.
        environment: added to this process's own.
    """

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        *,
        columns: int = 100,
        rows: int = 30,
    ):
        self.screen = pyte.HistoryScreen(columns, rows, history=2000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self.received = b""
        self._text: str | None = None  # of the screen as it is
        program = "from ifp_mlx.cli.app import main; main()"
        command = [sys.executable, "-c", program, *arguments]
        size = struct.pack("HHHH", rows, columns, 0, 0)
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, size)
            # Named in full: readline sets COLUMNS behind Python's back.
            inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
            inherited |= {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.execve(command[0], command, inherited | environment)

    def press(self, *keys: str) -> None:
        """Type text, or keys by their names."""
        for key in keys:
            os.write(self._file, KEYS.get(key, key).encode())
            self._read(0.05)

    def paste(self, text: str) -> None:
        """Paste text as a terminal does it."""
        os.write(self._file, f"\x1b[200~{text}\x1b[201~".encode())
        self._read(0.05)

    def lines(self) -> list[str]:
        """Return what is on the screen and what has scrolled off it, oldest first."""
        above = [
            "".join(row[column].data for column in range(self.screen.columns))
            for row in self.screen.history.top
        ]
        return [line.rstrip() for line in [*above, *self.screen.display]]

    def text(self) -> str:
        """Return all lines."""
        if self._text is None:
            self._text = "\n".join(self.lines())
        return self._text

    def wait_for(self, text: str, *, count: int = 1) -> None:
        """Read until ``text`` is on the screen ``count`` times."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.text().count(text) < count:
            alive = self._read(0.05)
            if time.monotonic() > deadline or not alive:
                raise AssertionError(f"no {text!r} (x{count}) on this screen:\n{self.text()}")

    def wait_for_prompt(self) -> None:
        """Read until an empty prompt waits for a message."""
        deadline = time.monotonic() + TIMEOUT_S
        while "›" not in [line.strip() for line in self.lines()[-self.screen.lines :]]:
            alive = self._read(0.05)
            if time.monotonic() > deadline or not alive:
                raise AssertionError(f"no prompt on this screen:\n{self.text()}")

    def wait_for_end(self) -> int:
        """Read until the program ends and return its exit code."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._read(0.05):
            if time.monotonic() > deadline:
                raise AssertionError(f"still running:\n{self.text()}")
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        """End the program as a crash would."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def close(self) -> None:
        """End the program if it still runs."""
        self.kill()
        os.close(self._file)

    def _read(self, seconds: float) -> bool:
        """Take in what the program writes; return whether it may write more."""
        ready, _, _ = select.select([self._file], [], [], seconds)
        if ready:
            try:
                content = os.read(self._file, 65536)
            except OSError:  # Linux: the other side is closed
                return False
            if not content:
                return False
            self.received += content
            self._text = None
            self._stream.feed(content)
        return True


@contextlib.contextmanager
def terminal(
    *arguments: str | Path, columns: int = 100, rows: int = 30, **environment: str
) -> Iterator[Terminal]:
    """Run ``ifp`` with ``arguments`` on a terminal of this size."""
    running = Terminal([str(a) for a in arguments], environment, columns=columns, rows=rows)
    try:
        yield running
    finally:
        running.close()
