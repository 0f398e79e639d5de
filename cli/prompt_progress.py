"""How far the reading of a long prompt is: tokens done and time left, on a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ifp_mlx.cli.terminal import status_console

if TYPE_CHECKING:
    from rich.status import Status

_PATIENCE_S = 1.0
"""Nothing is shown of a prompt that is read sooner."""


class PromptProgress:
    """A line on standard error that goes when the prompt is read; nothing where that is a file.

    It appears once reading has taken a second and will take some more.
    """

    def __init__(self) -> None:
        console = status_console()
        self._console = console if console.is_terminal and not console.is_dumb_terminal else None
        self._status: Status | None = None
        self._start_s = time.monotonic()

    def __enter__(self) -> PromptProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def show(self, done: int, total: int) -> None:
        """Show how much is read; take the line away when that is all."""
        if done >= total:
            self._clear()
        if self._console is None or done >= total:
            return
        passed_s = time.monotonic() - self._start_s
        if done == 0:
            self._start_s = time.monotonic()
            return
        line = reading_line(done, total, passed_s)
        if self._status is not None:
            self._status.update(line)
        elif passed_s > _PATIENCE_S:
            self._status = self._console.status(line, spinner="dots")
            self._status.start()

    def _clear(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def reading_line(done: int, total: int, passed_s: float) -> str:
    """Return what the line says: tokens read, tokens in all, time left at the speed so far."""
    left_s = passed_s * (total - done) / done
    left = f"{left_s:.0f} s" if left_s < 90 else f"{left_s / 60:.0f} min"
    return f"reading the prompt: {done:,} of {total:,} tokens, {left} left"
