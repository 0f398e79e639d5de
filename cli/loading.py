"""From options to an assistant and a sub-network, and the lines that say what was done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ifp_mlx.cli.options import Amount, AssistantOptions, SubnetOptions
from ifp_mlx.cli.terminal import duration, part_of_bytes, say, title, working

RISKY_EXPERT_SHARE = 0.5
"""Published mixtures lost much of what they could at half of their experts (docs/experts.md)."""

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.subnets.subnetwork import SubNetwork
    from ifp_mlx.subnets.task_settings import TaskSetting
    from ifp_mlx.text.task_examples import TaskExample


def load_assistant(
    options: AssistantOptions,
    *,
    task: str | None = None,
    preload: bool = True,
    as_stored: bool = False,
) -> Assistant:
    """Load the model that the options name, with a spinner while that takes.

    Args:
        options: which model, and how it is used.
        task: what it will be used for, if that is known: ``ifp fit`` may have measured it.
        preload: False leaves the dense model alone until something needs it.
        as_stored: sub-networks are to be written, not computed with.
    """
    source = options.source
    with working(f"loading {Path(source.model).name}"):
        from ifp_mlx.assistant import Assistant
        from ifp_mlx.blas import ADVICE, lacks_openblas
        from ifp_mlx.convert.registry import resolve_model
        from ifp_mlx.selection.spec import SelectorSpec
        from ifp_mlx.storage.home import subnet_cache_folder
        from ifp_mlx.subnets.task_cache import TaskCache

        auto = options.selector == "auto"
        path = resolve_model(source.model)
        setting = task_setting(path, task) if options.read_with == "auto" else None
        assistant = Assistant.load(
            path,
            adapter=source.adapter,
            use_adapter=not source.no_adapter,
            selector=None if auto else SelectorSpec.parse(options.selector),
            options=dataclasses.replace(options.cut, as_stored=as_stored),
            reads_with_part=options.read_with == "part" or bool(setting and setting.only_reads),
            cache=None if options.no_cache else TaskCache(subnet_cache_folder()),
            reuse_threshold=options.reuse,
            preload=preload,
        )
    if lacks_openblas():
        say(ADVICE)
    return assistant


def task_setting(path: Path, task: str | None) -> TaskSetting | None:
    """Return what ``ifp fit --use`` set for a task on a model, if it did."""
    from ifp_mlx.storage.home import task_settings_folder
    from ifp_mlx.storage.identity import fingerprint
    from ifp_mlx.subnets.task_settings import TaskSettings

    folder = task_settings_folder()
    if task is None or not folder.exists():
        return None
    return TaskSettings(folder).get(fingerprint(path), task)


def num_kept_units(assistant: Assistant, amount: Amount, task: str | None = None) -> int:
    """Return K for an amount; says so when ``--keep`` had to be rounded.

    Args:
        assistant: of the model.
        amount: what the flags say.
        task: whose own setting counts where they say nothing.

    Raises:
        UsageError: the model cannot be cut to that amount.
    """
    amounts = assistant.amounts
    if amount.keep_units is not None:
        return amounts.check(amount.keep_units)
    if amount.keep is None:
        if assistant.memory_limit is not None:
            return assistant.most_that_fit()
        setting = task_setting(assistant.model_path, task)
        if setting is not None and setting.only_reads == assistant.reads_with_part:
            return setting.num_kept_units
        return assistant.default_num_kept_units
    kept = amounts.nearest(amount.keep)
    if kept != amount.keep * amounts.num_units:
        say(
            f"--keep {amount.keep:g} is {kept} of {amounts.num_units} {amounts.label} "
            f"({kept / amounts.num_units:.3f}), the nearest that can be kept"
        )
    return kept


def choose_subnetwork(
    assistant: Assistant,
    options: SubnetOptions,
    first_message: str,
    examples: Sequence[TaskExample] = (),
    *,
    where_it_pays: bool = False,
) -> SubNetwork:
    """Return the sub-network for the task, or for the first message if there is no task.

    Args:
        assistant: makes it.
        options: which one.
        first_message: what selects without a task.
        examples: inputs of the task, which select along with its description.
        where_it_pays: let the message select only where it is answered sooner so; the whole model
            answers otherwise. An amount that the user names is always cut.
    """
    if options.dense:
        return assistant.dense()
    kept = num_kept_units(assistant, options.amount, options.task)
    is_free = options.task is None and not options.amount.is_given and kept < assistant.num_units
    if where_it_pays and is_free and not assistant.selecting_pays(first_message, kept):
        return dataclasses.replace(assistant.dense(), prompt_too_short=True)
    for caution in _cautions(assistant, kept, options.task):
        say(caution)
    with working("preparing the sub-network"):
        if options.task is not None:
            return assistant.subnetwork_for_task(options.task, kept, examples)
        return assistant.subnetwork_for_prompt(first_message, kept)


def _cautions(assistant: Assistant, kept: int, task: str | None) -> list[str]:
    """Return what speaks against a sub-network, a line each; what was measured is not doubted."""
    setting = task_setting(assistant.model_path, task)
    measured = (
        setting is not None
        and kept >= setting.num_kept_units
        # What may read was not found fit to write; what may write may read.
        and (assistant.reads_with_part or not setting.only_reads)
    )
    if measured or kept == assistant.num_units:
        return []
    lines = []
    if (caution := _caution_about(assistant, kept)) is not None:
        lines.append(caution)
    if assistant.files.selector.name == "prompt" and assistant.files.calibration is None:
        lines.append("units are picked by the text alone: ifp calibrate, once, makes better picks")
    return lines


def _caution_about(assistant: Assistant, kept: int) -> str | None:
    """Return what is known to speak against an amount, in one line; None for nothing."""
    share = kept / assistant.num_units
    label = assistant.kind.label
    if assistant.reads_with_part:
        return (
            f"reading with {share:.0%} of the {label}: not measured for this task, and two thirds "
            "cost a 0.5B coder every eighth function it got right; ifp fit does it"
        )
    if assistant.kind.router is not None:
        if share > RISKY_EXPERT_SHARE:
            return None
        return f"{share:.0%} of the {label}: risky, and not measured for this task; ifp fit does it"
    adapter = assistant.files.adapter
    if adapter is not None and assistant.files.is_adapted:
        least = min(adapter.keep_units)
        if kept >= least:
            return None
        return f"{kept} {label}: the adapter was trained for {least} and more; ifp fit measures it"
    if kept >= assistant.default_num_kept_units:
        return None
    return (
        f"{share:.0%} of the {label}: not measured for this task, and two thirds left a 0.5B coder "
        "a quarter of what it got right; ifp fit measures it"
    )


def describe_subnetwork(subnet: SubNetwork) -> str:
    """Return the line that says which sub-network answers, and where it came from."""
    units = subnet.kind.label
    if subnet.reader is not None:
        return f"the whole model writes; to read, {describe_subnetwork(subnet.reader)}"
    if subnet.prompt_too_short:
        return (
            f"the whole model answers ({subnet.num_units} {units} a layer): to select a part for "
            "this prompt would take longer than it saves; a task or an amount selects one"
        )
    if subnet.selection is None:
        return f"dense: all {subnet.num_units} {units} of each layer"
    memory = part_of_bytes(subnet.size.num_bytes, subnet.source.num_bytes)
    amount = f"{subnet.num_kept_units} of {subnet.num_units} {units}"
    purpose = f'for "{title(subnet.task)}"' if subnet.task else "for this prompt"
    if subnet.reused_task is not None:
        overlap = subnet.reuse_overlap or 0.0
        return (
            f'reused "{title(subnet.reused_task)}" {purpose} (overlap {overlap:.2f}): '
            f"{amount}, {memory}, {subnet.selector}{_requantization(subnet)}"
        )
    how = "loaded" if subnet.weights_from_disk else "sliced"
    times = f"{how} in {duration(subnet.slicing_s)}"
    times += _requantization(subnet)
    if subnet.from_cache:
        return f"cache hit {purpose}: {amount}, {memory}, {subnet.selector}, {times}"
    selected = f"selected in {duration(subnet.selection_s)}"
    line = f"selected {amount} {purpose}: {memory}, {subnet.selector}, {selected}, {times}"
    if subnet.close_task is not None:
        close = subnet.close_task
        share = math.floor(100 * close.overlap) / 100  # what --reuse must be for it
        line += f'\nclose to "{title(close.task)}": --reuse {share:.2f} would take its units'
    return line


def _requantization(subnet: SubNetwork) -> str:
    """Return what to say of weights that could not stay packed as they were."""
    if not subnet.requantization_error:
        return ""
    return f", packed again (error {subnet.requantization_error:.2%})"
