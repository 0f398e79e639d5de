"""``ifp cache``: the sub-networks that are ready for their tasks."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.help_sections import CommandGroup
from ifp_mlx.cli.loading import choose_subnetwork, describe_subnetwork, load_assistant
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.picture import draw_entry
from ifp_mlx.cli.task_tree import DEFAULT_THRESHOLD, Picture, Threshold, tasks
from ifp_mlx.cli.terminal import answer_console, gigabytes, plural, print_json, say, title
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    from ifp_mlx.subnets.task_cache import CacheEntry, TaskCache

_KEY_CHARACTERS = 8
app = CommandGroup("List, inspect and clean the sub-networks that are ready for their tasks.")

Name = Annotated[
    str,
    typer.Argument(metavar="TASK|KEY", help="A task description, or the beginning of a key."),
]


@app.command("list")
def list_entries(
    tree: Annotated[
        bool,
        typer.Option("--tree", help="Group the tasks by how much their sub-networks share."),
    ] = False,
    threshold: Threshold = DEFAULT_THRESHOLD,
    png: Picture = None,
    as_json: options.AsJson = False,
) -> None:
    """List the cached sub-networks, the latest used first."""
    if tree:
        tasks(threshold, png, as_json)
        return
    if png is not None:
        raise UsageError("--png draws the tree; add --tree")
    cache = _open_cache()
    entries = cache.entries()
    if as_json:
        print_json([_record(cache, entry) for entry in entries])
        return
    if not entries:
        say('the cache is empty; ifp cache add "help me write Python" fills it')
        return
    from rich.table import Table
    from rich.text import Text

    from ifp_mlx.subnets.compact_store import DEFAULT_MAX_BYTES, stored_bytes

    table = Table(box=None, pad_edge=False)
    for heading in ("key", "task", "units", "on disk", "in memory", "selector", "model", "used"):
        table.add_column(heading, overflow="fold" if heading == "task" else "ellipsis")
    for entry in entries:
        table.add_row(
            entry.path.stem[:_KEY_CHARACTERS],
            Text(title(entry.key.task)),
            f"{entry.key.num_kept_units}/{entry.num_units}",
            gigabytes(_bytes_on_disk(cache, entry)),
            "" if entry.memory_bytes is None else gigabytes(entry.memory_bytes),
            entry.key.selector,
            entry.model_name,
            _age(entry.last_used_s),
        )
    answer_console().print(table)
    total_bytes = sum(entry.size_bytes for entry in entries)
    say(
        f"{plural(len(entries), 'sub-network')}, {gigabytes(total_bytes)}, and "
        f"{gigabytes(stored_bytes(cache.compact_folder))} of weights in {cache.folder}; "
        f"at {gigabytes(DEFAULT_MAX_BYTES)} of weights the least recently used go"
    )


@app.command("show")
def show(
    name: Name,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", metavar="FILE.svg", help="Draw its units, layer by layer, as SVG."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="TASK|KEY", help="Draw what it shares with this one of its model."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show one sub-network, and how much it has in common with others of the same model."""
    cache = _open_cache()
    entry = cache.find(name)
    if picture is not None:
        draw_entry(picture, entry, None if against is None else cache.find(against))
    elif against is not None:
        raise UsageError("--against is for the picture; add --picture FILE.svg")
    overlaps = sorted(_overlaps(cache, entry), key=lambda pair: -pair[1])
    if as_json:
        shared = [
            {
                "key": other.path.stem,
                "task": other.key.task,
                "num_kept_units": other.key.num_kept_units,
                "selector": other.key.selector,
                "overlap": overlap,
            }
            for other, overlap in overlaps
        ]
        print_json({**_record(cache, entry), "overlaps": shared})
        return
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    facts.add_row("task", Text(entry.key.task))
    facts.add_row("key", entry.path.stem)
    facts.add_row("units", f"{entry.key.num_kept_units} of {entry.num_units} in each layer")
    facts.add_row("selector", f"{entry.key.selector} (version {entry.key.selector_version})")
    if entry.reuse is not None:
        reused = f'"{title(entry.reuse.task)}" (overlap {entry.reuse.overlap:.2f})'
        facts.add_row("reused", Text(reused))
    if entry.num_examples:
        facts.add_row("read", f"the description and {plural(entry.num_examples, 'example')}")
    facts.add_row("model", entry.model_name)
    if entry.requantization_error:
        facts.add_row("packed again", f"with an error of {entry.requantization_error:.2%}")
    facts.add_row("created", f"{_age(entry.created_s)}, used {_age(entry.last_used_s)}")
    weights = gigabytes(_bytes_on_disk(cache, entry) - entry.size_bytes)
    facts.add_row("file", f"{entry.path} ({gigabytes(entry.size_bytes)}, {weights} of weights)")
    if entry.memory_bytes is not None:
        facts.add_row("memory", gigabytes(entry.memory_bytes))
    console = answer_console()
    console.print(facts)
    if overlaps:
        console.print()
        table = Table(box=None, pad_edge=False, title_justify="left", title_style="")
        table.title = "Share of units in common, mean over layers"
        for heading in ("overlap", "units", "task"):
            table.add_column(heading, overflow="fold")
        for other, overlap in overlaps:
            units = f"{other.key.num_kept_units}/{other.num_units}"
            table.add_row(f"{overlap:.3f}", units, Text(title(other.key.task)))
        console.print(table)


@app.command("add")
@expands_options
def add(
    task: Annotated[str, typer.Argument(help="The task description.")],
    *,
    amount: options.Amount,
    examples: Annotated[
        Path | None,
        typer.Option(
            "--examples",
            metavar="FILE",
            help="Inputs of the task, which select along with the description: a request on each "
            'line, or a .jsonl file of {"prompt": ...}.',
        ),
    ] = None,
    selector: options.Selector = "auto",
    memory: options.Memory = None,
    source: options.ModelOptions,
    as_json: options.AsJson = False,
) -> None:
    """Select a task's sub-network now, so that the first chat about it begins at once.

    With --examples it is selected anew, and replaces the one that is cached.
    """
    from ifp_mlx.text.task_examples import read_task_examples

    inputs = () if examples is None else read_task_examples(examples)
    subnet_options = options.SubnetOptions(task, amount)
    assistant = load_assistant(options.AssistantOptions(selector, memory=memory, source=source))
    subnet = choose_subnetwork(assistant, subnet_options, task, inputs)
    if as_json:
        key = assistant.cache_key(task, subnet.num_kept_units)
        cache = _open_cache()
        print_json(_record(cache, cache.find(key.digest)))
    else:
        say(describe_subnetwork(subnet))


@app.command("rm")
def remove(
    names: Annotated[
        list[str],
        typer.Argument(metavar="TASK|KEY...", help="Task descriptions or beginnings of keys."),
    ],
    as_json: options.AsJson = False,
) -> None:
    """Remove sub-networks from the cache."""
    cache = _open_cache()
    entries = [cache.find(name) for name in names]  # all are found, or none is removed
    records = [_record(cache, entry) for entry in entries]
    for entry in entries:
        cache.remove(entry)
        if not as_json:
            say(f'removed "{title(entry.key.task)}" ({entry.path.stem[:_KEY_CHARACTERS]})')
    if as_json:
        print_json(records)


@app.command("prune")
def prune(
    max_mb: Annotated[
        float,
        typer.Option(
            "--max-mb",
            min=0.0,
            help="Megabytes that may stay, of selections and of weights each; 0 removes all.",
        ),
    ],
    as_json: options.AsJson = False,
) -> None:
    """Remove the least recently used sub-networks until the rest fits."""
    from ifp_mlx.subnets import compact_store

    cache = _open_cache()
    before_bytes = compact_store.stored_bytes(cache.compact_folder)
    removed = cache.prune(round(max_mb * 1e6))
    compact_store.prune(cache.compact_folder, round(max_mb * 1e6))
    if as_json:
        print_json([_record(cache, entry) for entry in removed])
    else:
        freed_bytes = sum(entry.size_bytes for entry in removed) + before_bytes
        freed_bytes -= compact_store.stored_bytes(cache.compact_folder)
        say(f"removed {plural(len(removed), 'sub-network')}, {gigabytes(freed_bytes)}")


@app.command("verify")
def verify(as_json: options.AsJson = False) -> None:
    """Check every sub-network; damaged ones are moved aside, and selected again when needed."""
    cache = _open_cache()
    problems = cache.verify()
    num_good = len(cache.entries())
    if as_json:
        print_json({"good": num_good, "problems": problems})
    else:
        for problem in problems:
            say(problem)
        say(f"{plural(num_good, 'good sub-network')}, {plural(len(problems), 'damaged one')}")
    if problems:
        raise typer.Exit(1)


@app.command("path")
def path(as_json: options.AsJson = False) -> None:
    """Print where the cache is."""
    folder = str(_open_cache().folder)
    if as_json:
        print_json({"path": folder})
    else:
        typer.echo(folder)


def _open_cache() -> TaskCache:
    from ifp_mlx.storage.home import subnet_cache_folder
    from ifp_mlx.subnets.task_cache import TaskCache

    return TaskCache(subnet_cache_folder())


def _overlaps(cache: TaskCache, entry: CacheEntry) -> list[tuple[CacheEntry, float]]:
    from ifp_mlx.errors import SelectionError

    selection = entry.load()
    found = []
    for other in cache.entries():
        if other.path == entry.path or other.key.base != entry.key.base:
            continue
        try:
            found.append((other, selection.mean_overlap(other.load())))
        except SelectionError as error:
            say(f"left out {other.path.name}: {error}")
    return found


def _bytes_on_disk(cache: TaskCache, entry: CacheEntry) -> int:
    """Return what an entry takes on the disk, without what it shares with others of its model."""
    from ifp_mlx.errors import SelectionError
    from ifp_mlx.subnets.compact_store import own_bytes

    try:
        return entry.size_bytes + own_bytes(cache.compact_folder, entry.load())
    except SelectionError:  # damaged: ifp cache verify says so
        return entry.size_bytes


def _record(cache: TaskCache, entry: CacheEntry) -> dict[str, Any]:
    return {
        "key": entry.path.stem,
        "task": entry.key.task,
        "num_kept_units": entry.key.num_kept_units,
        "num_units": entry.num_units,
        "selector": entry.key.selector,
        "selector_version": entry.key.selector_version,
        "model": entry.model_name,
        "base_fingerprint": entry.key.base,
        "adapter_fingerprint": entry.key.adapter,
        "created": _iso(entry.created_s),
        "last_used": _iso(entry.last_used_s),
        "size_bytes": entry.size_bytes,
        "disk_bytes": _bytes_on_disk(cache, entry),
        "memory_bytes": entry.memory_bytes,
        "requantization_error": entry.requantization_error,
        "num_examples": entry.num_examples,
        "reused_task": entry.reuse.task if entry.reuse else None,
        "reuse_overlap": entry.reuse.overlap if entry.reuse else None,
        "path": str(entry.path),
    }


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _age(seconds: float) -> str:
    then = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    passed_s = (datetime.datetime.now(datetime.UTC) - then).total_seconds()
    for unit_s, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if passed_s >= unit_s:
            return f"{plural(int(passed_s // unit_s), unit)} ago"
    return "just now"
