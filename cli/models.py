"""``ifp models``: the models on this machine, what of them fits, and the tasks that are ready."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.help_sections import CommandGroup
from ifp_mlx.cli.terminal import answer_console, gigabytes, plural, print_json, say, title, working
from ifp_mlx.errors import IFPError, UsageError

if TYPE_CHECKING:
    from ifp_mlx.subnets.fits import WhatFits
    from ifp_mlx.subnets.task_cache import CacheEntry, TaskCache

app = CommandGroup("List, describe and remove the models on this machine.")

_PACKED = ("U32", "U8")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Of safetensors files."""


@dataclasses.dataclass(frozen=True)
class _Model:
    """One model folder.

    Attributes:
        path: of the folder.
        disk_bytes: of all its files.
        problem: why it cannot be used; the rest then says nothing.
        family: as config.json names it.
        weights: how they are stored, for people.
        context_length: the most tokens of a conversation.
        fits: what of it fits this machine.
        tasks: cached for it, the latest used first.
    """

    path: Path
    disk_bytes: int
    problem: str | None = None
    family: str = ""
    weights: str = ""
    context_length: int = 0
    fits: WhatFits | None = None
    tasks: tuple[CacheEntry, ...] = ()


Name = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The name of a model, as ifp models list shows it, or a model's folder.",
        autocompletion=options.model_names,
    ),
]


@app.command("list")
def list_models(as_json: options.AsJson = False) -> None:
    """List the models on this machine: size, how the weights are stored, what fits, ready tasks."""
    from ifp_mlx.storage.home import models_folder

    with working("looking at the models"):
        cache = _open_cache()
        found = [_look_at(models_folder() / name, cache) for name in options.model_names()]
    if as_json:
        print_json([_record(model) for model in found])
        return
    if not found:
        say(f"no models yet; ifp pull {options.DEFAULT_MODEL} fetches one")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("model", "on disk", "weights", "tasks", "on this machine"):
        table.add_column(heading, overflow="fold")
    for model in found:
        told = model.problem or (model.fits.line() if model.fits else "")
        size = gigabytes(model.disk_bytes)
        num_tasks = "" if model.problem else str(len(_tasks(model)))
        table.add_row(model.path.name, size, model.weights, num_tasks, Text(told))
    answer_console().print(table)


@app.command("show")
def show(name: Name, as_json: options.AsJson = False) -> None:
    """Describe one model: where it came from, what of it fits here, which tasks are ready."""
    from ifp_mlx.convert.registry import resolve_model

    path = resolve_model(name)
    with working("looking at the model"):
        model = _look_at(path, _open_cache())
    if as_json:
        print_json(_record(model))
        return
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    rows = [("model", path.name), ("folder", f"{path} ({gigabytes(model.disk_bytes)})")]
    if model.problem is not None:
        rows.append(("problem", model.problem))
    else:
        rows += [
            ("family", f"{model.family}, {model.weights}, {model.context_length:,} tokens context"),
            *[(label, text) for label, text in _origin(path).items()],
            *[("memory", text) for text in _amounts(model)],
            *[("task", text) for text in _tasks(model)],
        ]
        if not model.tasks:
            rows.append(("task", 'none ready; ifp cache add "..." prepares one'))
    for label, text in rows:
        facts.add_row(label, Text(text))
    answer_console().print(facts)


@app.command("rm")
def remove(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Names of models.", autocompletion=options.model_names
        ),
    ],
    as_json: options.AsJson = False,
) -> None:
    """Remove models that ifp pull fetched, and the sub-networks that are cached for them.

    A folder elsewhere, which ifp convert or ifp export wrote, is left alone: it is yours.
    """
    from ifp_mlx.storage.home import models_folder

    for name in names:  # all are there, or none is removed
        if name not in options.model_names():
            raise UsageError(f"{models_folder()} has no model {name!r}; ifp models list shows them")
    cache = _open_cache()
    removed = [_look_at(models_folder() / name, cache) for name in dict.fromkeys(names)]
    for model in removed:
        for entry in model.tasks:
            cache.remove(entry)
        # Out of sight at once: what is left if this is interrupted is no half of a model.
        doomed = tempfile.mkdtemp(dir=model.path.parent, prefix=f".{model.path.name}.partial-")
        shutil.rmtree(model.path.rename(Path(doomed, model.path.name)).parent)
        if not as_json:
            tasks = f" and {plural(len(model.tasks), 'sub-network')}" if model.tasks else ""
            say(f"removed {model.path.name}{tasks}, {gigabytes(model.disk_bytes)}")
    if as_json:
        print_json([_record(model) for model in removed])


def _look_at(path: Path, cache: TaskCache) -> _Model:
    from ifp_mlx.storage.config_file import read_config
    from ifp_mlx.storage.identity import fingerprint
    from ifp_mlx.subnets.fits import what_fits_of_checkpoint

    disk_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    try:
        config, base = read_config(path), fingerprint(path)
        return _Model(
            path,
            disk_bytes,
            family=str(config.content["model_type"]),
            weights=_weights(path, config.content),
            context_length=config.context_length,
            fits=what_fits_of_checkpoint(path),
            tasks=tuple(entry for entry in cache.entries() if entry.key.base == base),
        )
    except IFPError as error:
        return _Model(path, disk_bytes, problem=str(error))


def _weights(path: Path, config: Mapping[str, Any]) -> str:
    """Return how most of the weights are stored."""
    from ifp_mlx.storage.weights import stored_tensors

    num_bytes: dict[str, int] = {}
    for tensor in stored_tensors(path).values():
        num_bytes[tensor.dtype] = num_bytes.get(tensor.dtype, 0) + tensor.num_bytes
    most = max(num_bytes, key=lambda dtype: num_bytes[dtype])
    packing = config.get("quantization") or config.get("quantization_config")
    if not packing or most not in _PACKED:
        return _DTYPES.get(most, most)
    mode = packing.get("mode", "affine")
    return f"{packing['bits']} bits" if mode == "affine" and "bits" in packing else str(mode)


def _origin(path: Path) -> dict[str, str]:
    from ifp_mlx.storage.origin import read_origin

    origin = read_origin(path)
    told = {"base": origin.base_model, "from": origin.source, "licence": origin.licence}
    return {label: text for label, text in told.items() if text}


def _amounts(model: _Model) -> list[str]:
    """Return a line for each amount of units that was looked at."""
    fits = model.fits
    if fits is None:
        return []
    lines = []
    for fit in (fits.whole, *fits.parts):
        verdict = "fits" if fit.fits else f"does not fit in {gigabytes(fits.available_bytes)}"
        lines.append(
            f"{fit.num_kept_units} of {fits.num_units} {fits.label}: "
            f"{gigabytes(fit.weights_bytes)} of weights, {gigabytes(fit.peak_bytes)} in all with "
            f"{fits.context_tokens:,} tokens of context, {verdict}"
        )
    return lines


def _tasks(model: _Model) -> list[str]:
    """Return the tasks that are ready, each once: description and amounts."""
    amounts: dict[str, list[int]] = {}
    for entry in model.tasks:
        amounts.setdefault(entry.key.task, []).append(entry.key.num_kept_units)
    return [
        f"{title(task)} ({', '.join(map(str, sorted(set(kept))))} units)"
        for task, kept in amounts.items()
    ]


def _record(model: _Model) -> dict[str, Any]:
    return {
        "name": model.path.name,
        "path": str(model.path),
        "disk_bytes": model.disk_bytes,
        "problem": model.problem,
        "family": model.family or None,
        "weights": model.weights or None,
        "context_length": model.context_length or None,
        "fits": dataclasses.asdict(model.fits) if model.fits else None,
        "tasks": [
            {"task": entry.key.task, "num_kept_units": entry.key.num_kept_units}
            for entry in model.tasks
        ],
    }


def _open_cache() -> TaskCache:
    from ifp_mlx.storage.home import subnet_cache_folder
    from ifp_mlx.subnets.task_cache import TaskCache

    return TaskCache(subnet_cache_folder())
