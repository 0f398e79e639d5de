"""How long work tells how far it is."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all (0 when not known)."""

_POLL_SECONDS = 0.2


def no_progress(stage: str, done_bytes: int, total_bytes: int) -> None:
    """Report nothing."""


@contextlib.contextmanager
def folder_growth(folder: Path, stage: str, total_bytes: int, progress: Progress) -> Iterator[None]:
    """Report the size of ``folder`` while the block, which downloads into it, runs.

    Downloaders differ in how they report; the bytes that arrive on disk do not.
    """
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(_POLL_SECONDS):
            progress(stage, min(_folder_bytes(folder), total_bytes), total_bytes)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join()
    progress(stage, total_bytes, total_bytes)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # downloaders rename and remove files meanwhile
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
    return total
