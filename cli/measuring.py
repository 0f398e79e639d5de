"""What the commands share that measure: the model under measurement, and progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ifp_mlx.cli.loading import load_assistant
from ifp_mlx.cli.options import AssistantOptions, ModelOptions
from ifp_mlx.cli.terminal import say, status_console

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.evaluation.rows import Row
    from ifp_mlx.evaluation.subject import Subject

Data = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="FOLDER",
        help="Text that nothing was trained or calibrated on, one file for each domain: NAME.jsonl "
        "with lines of prompt and response, lm_NAME.jsonl with lines of text.",
    ),
]
Domains = Annotated[
    str | None,
    typer.Option("--domains", metavar="NAME,...", help="Only these domains of the folder."),
]
Tasks = Annotated[
    Path | None,
    typer.Option(
        "--tasks",
        metavar="FILE",
        help="Task descriptions for +task rows: a JSON object, domain to description. The package "
        "has its own.",
    ),
]


def load_subject(source: ModelOptions, tasks: Path | None) -> tuple[Assistant, Subject]:
    """Return the assistant that the flags name, and what of it is measured; nothing is cached."""
    assistant = load_assistant(AssistantOptions(no_cache=True, source=source))
    from ifp_mlx.evaluation.quality import load_task_descriptions
    from ifp_mlx.evaluation.subject import TASK_DESCRIPTIONS, Subject

    return assistant, Subject.of(assistant, load_task_descriptions(tasks or TASK_DESCRIPTIONS))


def parse_rows(names: list[str], assistant: Assistant) -> list[Row]:
    """Return the rows that texts describe, each once."""
    from ifp_mlx.evaluation.rows import parse_row

    amounts, default = assistant.amounts, assistant.default_num_kept_units
    rows = (parse_row(name, amounts, default) for name in names)
    return list(dict.fromkeys(rows))


def names(text: str | None) -> list[str] | None:
    """Return the names of a list with commas; None for none."""
    return text.split(",") if text else None


@contextlib.contextmanager
def measuring() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that takes what is being done, how much is done, and of how much.

    On a terminal it draws one bar that moves on from stage to stage; elsewhere each stage is one
    line, when it is done.
    """
    console = status_console()
    if not console.is_terminal:

        def announce(stage: str, done: int, total: int) -> None:
            if done == total:
                say(f"{stage}: done")

        yield announce
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=None)

        def show(stage: str, done: int, total: int) -> None:
            progress.update(bar, description=stage, completed=done, total=total)

        yield show
