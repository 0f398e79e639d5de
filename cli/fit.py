"""``ifp fit``: what each size of a model costs a task, measured on the user's own examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ifp_mlx.cli import measuring, options
from ifp_mlx.cli.loading import load_assistant
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.terminal import answer_console, gigabytes, print_json, say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.fitting.measure import Halves
    from ifp_mlx.fitting.results import Measured


@expands_options
def fit(
    *,
    task: Annotated[
        str,
        typer.Option("--task", "-t", metavar="SENTENCE", help="What the model is for."),
    ],
    examples: Annotated[
        Path,
        typer.Option(
            "--examples",
            metavar="FILE",
            help="Requests of the task: a line each, or JSON lines with prompt (or messages) and, "
            "if you know it, answer. Half of them select, the other half measure.",
        ),
    ],
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="COMMAND",
            help="Judges each answer: gets one JSON object with prompt, answer and expected on "
            "standard input, and ends with 0 if the answer is right.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="SIZE", help="Recommend the best that fits here, such as 9GB."
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, metavar="N", help="Most examples to measure on.")
    ] = 20,
    max_tokens: options.MaxTokens = 128,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Also draw the table, as a PNG."),
    ] = None,
    use: Annotated[
        bool,
        typer.Option(
            "--use",
            help="Make what is recommended this task's own setting: chat, generate, serve and "
            "export take it where nothing else is said.",
        ),
    ] = False,
    source: options.ModelOptions,
    as_json: options.AsJson = False,
) -> None:
    """Measure what each size of a model costs a task, on your own examples.

    The whole model answers the examples first. Then the whole model with fewer bits, parts of it of
    several sizes, and the whole model read with a part of it are held against those answers: of 100
    tokens, how many would be others? With --check your own command says what is right. Running it
    again goes on from what is measured already.

    Example: ifp fit --task "write SQL" --examples requests.txt --use
    """
    from ifp_mlx.fitting.judge import CommandJudge
    from ifp_mlx.fitting.measure import Fit, Halves
    from ifp_mlx.fitting.results import FitRecord, recommend
    from ifp_mlx.storage.home import fits_folder
    from ifp_mlx.storage.identity import fingerprint
    from ifp_mlx.text.task_examples import read_task_examples

    if not task.strip():
        raise UsageError("--task is empty; describe the task in a sentence")
    memory_bytes = None if memory is None else options.parse_bytes(memory)
    judge = None if check is None else CommandJudge(check)
    halves = Halves.of(read_task_examples(examples), limit)
    assistant = load_assistant(options.AssistantOptions(no_cache=True, source=source))
    facts = {
        "model": assistant.model_path.name,
        "base": fingerprint(assistant.model_path),
        "adapter": assistant.files.adapter_fingerprint,
        "selector": str(assistant.files.selector),
        "task": task,
        "selecting": [dataclasses.astuple(example) for example in halves.selecting],
        "measuring": [dataclasses.astuple(example) for example in halves.measuring],
        "check": check,
        "max_tokens": max_tokens,
    }
    record = FitRecord(fits_folder(), facts)
    run = Fit(assistant, task, halves, record, judge=judge, max_tokens=max_tokens)
    say(
        f"{len(halves.selecting)} examples select, {len(halves.measuring)} measure; "
        f"{len(run.candidates())} candidates"
    )
    with measuring.measuring() as progress:
        rows = list(run.run(progress))
    best = recommend(rows, memory_bytes)
    if as_json:
        print_json(_document(assistant, rows, best))
    else:
        _print_table(assistant, rows, best)
        answer_console().print(_sentence(assistant, rows, best, memory_bytes), markup=False)
    if picture is not None:
        from ifp_mlx.fitting.picture import draw

        draw(rows, assistant.amounts, task, picture)
    if use:
        _use(assistant, task, halves, rows, best)


def _print_table(assistant: Assistant, rows: Sequence[Measured], best: Measured | None) -> None:
    from rich.table import Table

    from ifp_mlx.fitting.results import frontier

    on_frontier = frontier(rows)
    has_check = any(row.num_right is not None for row in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "keeps", "bits"):
        table.add_column(heading)
    headings = ["memory", "disk", "changed", "same", "tok/s", "first"]
    for heading in [*headings, *(["right"] if has_check else [])]:
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: -row.memory_bytes):
        candidate = row.candidate
        mark = "→" if row == best else "·" if candidate.key in on_frontier else ""
        share = f"{candidate.num_kept_units / assistant.num_units:.0%}"
        figures = [
            gigabytes(row.memory_bytes),
            gigabytes(row.disk_bytes),
            f"{row.fidelity.changed:.1f}" + ("+" if row.is_lost else ""),
            f"{row.fidelity.same_tokens:.0f}",
            "" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}",
            "" if row.first_token_s is None else f"{row.first_token_s:.1f} s",
        ]
        if has_check:
            figures.append("" if row.num_right is None else f"{row.num_right}/{row.num_checked}")
        keeps = f"{share} reads" if candidate.only_reads else share
        table.add_row(mark, keeps, str(candidate.bits or "own"), *figures)
    answer_console().print(table)
    say(
        f"keeps: of the {assistant.amounts.label} (reads: the whole model writes); changed: of 100 "
        "tokens, how many would be others than the whole model's; same: first tokens of an answer "
        "that stay (median); · nothing smaller is as faithful; + given up"
    )
    if any(row.is_adapted for row in rows) and not has_check:
        say(
            "parts of this model come with an adapter, which answers in its own way; that they "
            "differ says nothing: --check finds out whether they are right, --no-adapter measures "
            "the model's own parts"
        )


def _sentence(
    assistant: Assistant,
    rows: Sequence[Measured],
    best: Measured | None,
    memory_bytes: int | None,
) -> str:
    """Return the recommendation."""
    if best is None:
        where = "" if memory_bytes is None else f" that fits in {gigabytes(memory_bytes)}"
        return f"Nothing{where} keeps up with the whole model; take a smaller model for this task."
    label = best.candidate.label(assistant.amounts)
    whole = max(rows, key=lambda row: (row.candidate.num_kept_units, row.candidate.bits is None))
    if best == whole:
        return "Recommended: the whole model; nothing smaller keeps up with it on these examples."
    right = ""
    if best.num_right is not None:
        right = f", {best.num_right} of {best.num_checked} right (whole: {whole.num_right})"
    return (
        f"Recommended: {label}, {gigabytes(best.memory_bytes)} in place of "
        f"{gigabytes(whole.memory_bytes)}: {best.fidelity.changed:.1f} of 100 tokens "
        f"change{right}."
    )


def _use(
    assistant: Assistant,
    task: str,
    halves: Halves,
    rows: Sequence[Measured],
    best: Measured | None,
) -> None:
    """Make a candidate the task's setting, and cache its sub-network."""
    from ifp_mlx.storage.home import subnet_cache_folder, task_settings_folder
    from ifp_mlx.storage.identity import fingerprint
    from ifp_mlx.subnets.task_cache import TaskCache
    from ifp_mlx.subnets.task_settings import TaskSetting, TaskSettings

    if best is None:
        raise UsageError("nothing is recommended, so there is nothing to use")
    if best.candidate.bits is not None:
        raise UsageError(
            f"what is recommended has {best.candidate.bits} bits: make it with ifp quantize "
            f"{assistant.model_path} -o FOLDER --bits {best.candidate.bits}, then ifp fit --model "
            "FOLDER --use"
        )
    whole = max(rows, key=lambda row: (row.candidate.num_kept_units, row.candidate.bits is None))
    setting = TaskSetting(
        best.candidate.num_kept_units,
        best.candidate.only_reads,
        best.fidelity.changed,
        len(halves.measuring),
        best.num_right,
        whole.num_right,
    )
    assistant.cache = TaskCache(subnet_cache_folder())
    assistant.subnetwork_for_task(task, setting.num_kept_units, halves.selecting)
    settings = TaskSettings(task_settings_folder())
    settings.put(fingerprint(assistant.model_path), task, setting)
    say(f'"{task}" now uses {best.candidate.label(assistant.amounts)}')


def _document(
    assistant: Assistant, rows: Sequence[Measured], best: Measured | None
) -> dict[str, Any]:
    from ifp_mlx.fitting.results import frontier

    on_frontier = frontier(rows)
    return {
        "model": assistant.model_path.name,
        "num_units": assistant.num_units,
        "units": assistant.kind.label,
        "recommended": None if best is None else best.candidate.key,
        "rows": [
            {
                "key": row.candidate.key,
                "label": row.candidate.label(assistant.amounts),
                "on_frontier": row.candidate.key in on_frontier,
                **dataclasses.asdict(row),
            }
            for row in rows
        ],
    }
