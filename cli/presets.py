"""``ifp task``: presets, which are tasks under a name with how they are answered."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.help_sections import CommandGroup
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.terminal import answer_console, print_json, say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.chat.sampling import SamplingOptions
    from ifp_mlx.subnets.presets import Preset, Presets

app = CommandGroup("Save tasks under a name, with how they are answered.")

_SAMPLING = {
    "max_tokens": "max_new_tokens",
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
}
"""The names of the flags' values, and what the library calls them."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="What to call it, one word.")]


@app.command("save")
@expands_options
def save(
    context: typer.Context,
    *,
    name: Name,
    task: Annotated[
        str, typer.Option("--task", "-t", metavar="SENTENCE", help="What the model is for.")
    ],
    amount: options.Amount,
    system_prompt: options.SystemPrompt = None,
    sampling_flags: options.SamplingFlags,
) -> None:
    """Save a task with how much of the model it keeps, a system prompt and how answers are drawn.

    From then on --task NAME stands for all of it: in ifp chat and ifp generate, and in ifp serve,
    where requests say themselves how they are answered. Options given beside it come first.

    Examples: ifp task save py --task "help me write Python" --keep 0.75 --temp 0.3;
    ifp chat --task py
    """
    from ifp_mlx.subnets.presets import Preset

    if not task.strip():
        raise UsageError("--task is empty; describe the task in a sentence")
    sampling = dataclasses.asdict(sampling_flags.options)
    said = {_SAMPLING[flag]: sampling[_SAMPLING[flag]] for flag in _given(context)}
    preset = Preset(task, amount.keep, amount.keep_units, system_prompt, said)
    _presets().put(name, preset)
    say(f"saved {name}: {_described(preset)}; use it with --task {name}")


@app.command("list")
def list_presets(as_json: options.AsJson = False) -> None:
    """List the saved tasks."""
    presets = _presets()
    found = {name: preset for name in presets.names() if (preset := presets.get(name))}
    if as_json:
        print_json([{"name": name, **dataclasses.asdict(p)} for name, p in found.items()])
        return
    if not found:
        say('no saved tasks; ifp task save py --task "help me write Python" saves one')
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, preset in found.items():
        table.add_row(Text(name), Text(_described(preset)))
    answer_console().print(table)


@app.command("rm")
def remove(name: Name) -> None:
    """Forget a saved task; its sub-network stays in the cache."""
    _presets().remove(name)
    say(f"removed {name}")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the flags ask for, after a preset has filled in what they leave open."""

    subnet_options: options.SubnetOptions
    system_prompt: str | None
    sampling: SamplingOptions


def with_preset(
    context: typer.Context,
    subnet_options: options.SubnetOptions,
    system_prompt: str | None,
    sampling: SamplingOptions,
) -> Wanted:
    """Return what the flags and the preset that ``--task`` may name ask for together."""
    preset = find_preset(subnet_options.task)
    if preset is None:
        return Wanted(subnet_options, system_prompt, sampling)
    amount = subnet_options.amount
    if not amount.is_given and not subnet_options.dense:
        amount = amount_of(preset)
    given = {_SAMPLING[flag] for flag in _given(context)}
    saved = {field: value for field, value in preset.sampling.items() if field not in given}
    return Wanted(
        options.SubnetOptions(preset.task, amount, subnet_options.dense),
        system_prompt if system_prompt is not None else preset.system_prompt,
        dataclasses.replace(sampling, **saved),
    )


def find_preset(task: str | None) -> Preset | None:
    """Return the preset of this name; None if the task is a description, or there is no task."""
    return None if task is None else _presets().get(task)


def amount_of(preset: Preset) -> options.Amount:
    """Return how much of a model a preset keeps, as the flags would say it."""
    return options.Amount(preset.keep_ratio, preset.keep_units)


def _given(context: typer.Context) -> list[str]:
    """Return which flags about sampling are on the command line."""
    sources = {flag: context.get_parameter_source(flag) for flag in _SAMPLING}
    return [flag for flag, source in sources.items() if source and source.name == "COMMANDLINE"]


def _presets() -> Presets:
    from ifp_mlx.storage.home import presets_folder
    from ifp_mlx.subnets.presets import Presets

    return Presets(presets_folder())


def _described(preset: Preset) -> str:
    parts: list[Any] = [f'"{preset.task}"']
    if preset.keep_ratio is not None:
        parts.append(f"keep {preset.keep_ratio:g}")
    if preset.keep_units is not None:
        parts.append(f"{preset.keep_units} units")
    if preset.system_prompt is not None:
        parts.append(f'system prompt "{preset.system_prompt}"')
    flags = {field: flag.replace("_", "-") for flag, field in _SAMPLING.items()}
    parts += [f"{flags[field]} {value}" for field, value in preset.sampling.items()]
    return ", ".join(parts)
