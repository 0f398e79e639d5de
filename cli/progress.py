"""A progress bar on standard error: bytes done, bytes in all, speed, time left."""

import contextlib
from collections.abc import Callable, Iterator

from ifp_mlx.cli.terminal import say, status_console

_STAGE_WIDTH = 12


@contextlib.contextmanager
def bytes_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that takes a stage's name, bytes done and bytes in all.

    Each stage gets its own bar. Where standard error is no terminal each stage is one line.
    """
    console = status_console()
    if not console.is_terminal:
        seen: set[str] = set()

        def announce(stage: str, done_bytes: int, total_bytes: int) -> None:
            if stage not in seen:
                seen.add(stage)
                say(f"{stage} {total_bytes / 1e6:.1f} MB")

        yield announce
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bars: dict[str, TaskID] = {}
    columns = (
        TextColumn(f"{{task.description:<{_STAGE_WIDTH}}}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def show(stage: str, done_bytes: int, total_bytes: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total_bytes or None)
            progress.update(bars[stage], completed=done_bytes, total=total_bytes or None)

        yield show


@contextlib.contextmanager
def counting(verb: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the tokens of each example as it is done.

    Shows examples, tokens, speed and time on a terminal, nothing elsewhere: the end is unknown.
    """
    console = status_console()
    if not console.is_terminal:
        yield lambda num_tokens: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    num_examples = total_tokens = 0
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(verb, total=None)

        def count(num_tokens: int) -> None:
            nonlocal num_examples, total_tokens
            num_examples += 1
            total_tokens += num_tokens
            speed = total_tokens / max(progress.tasks[0].elapsed or 0.0, 1e-3)
            progress.update(
                bar,
                description=f"{verb} {num_examples:,} examples, {total_tokens:,} tokens, "
                f"{speed:,.0f} tokens/s",
            )

        yield count
