"""From options to an assistant and a sub-network, and the lines that say what was done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ifp_mlx.cli.options import Amount, AssistantOptions, SubnetOptions
from ifp_mlx.cli.terminal import duration, say, title, working

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.subnets.subnetwork import SubNetwork


def load_assistant(options: AssistantOptions, *, preload: bool = True) -> Assistant:
    """Load the model that the options name, with a spinner while that takes.

    Args:
        options: which model, and how it is used.
        preload: False leaves the dense model alone until something needs it.
    """
    source = options.source
    with working(f"loading {Path(source.model).name}"):
        from ifp_mlx.assistant import Assistant
        from ifp_mlx.convert.registry import resolve_model
        from ifp_mlx.selection.spec import SelectorSpec
        from ifp_mlx.storage.home import subnet_cache_folder
        from ifp_mlx.subnets.task_cache import TaskCache

        auto = options.selector == "auto"
        return Assistant.load(
            resolve_model(source.model),
            adapter=source.adapter,
            use_adapter=not source.no_adapter,
            selector=None if auto else SelectorSpec.parse(options.selector),
            options=options.cut,
            cache=None if options.no_cache else TaskCache(subnet_cache_folder()),
            reuse_threshold=options.reuse,
            preload=preload,
        )


def num_kept_units(assistant: Assistant, amount: Amount) -> int:
    """Return K for an amount; says so when ``--keep`` had to be rounded.

    Raises:
        UsageError: the model cannot be cut to that amount.
    """
    amounts = assistant.amounts
    if amount.keep_units is not None:
        return amounts.check(amount.keep_units)
    if amount.keep is None:
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
    examples: Sequence[str] = (),
) -> SubNetwork:
    """Return the sub-network for the task, or for the first message if there is no task.

    Args:
        assistant: makes it.
        options: which one.
        first_message: what selects without a task.
        examples: inputs of the task, which select along with its description.
    """
    if options.dense:
        return assistant.dense()
    kept = num_kept_units(assistant, options.amount)
    with working("preparing the sub-network"):
        if options.task is not None:
            return assistant.subnetwork_for_task(options.task, kept, examples)
        return assistant.subnetwork_for_prompt(first_message, kept)


def describe_subnetwork(subnet: SubNetwork) -> str:
    """Return the line that says which sub-network answers, and where it came from."""
    units = subnet.kind.label
    if subnet.selection is None:
        return f"dense: all {subnet.num_units} {units} of each layer"
    amount = f"{subnet.num_kept_units} of {subnet.num_units} {units}"
    purpose = f'for "{title(subnet.task)}"' if subnet.task else "for this prompt"
    if subnet.reused_task is not None:
        overlap = subnet.reuse_overlap or 0.0
        return (
            f'reused "{title(subnet.reused_task)}" {purpose} (overlap {overlap:.2f}): '
            f"{amount}, {subnet.selector}{_requantization(subnet)}"
        )
    how = "loaded" if subnet.weights_from_disk else "sliced"
    times = f"{how} in {duration(subnet.slicing_s)}"
    times += _requantization(subnet)
    if subnet.from_cache:
        return f"cache hit {purpose}: {amount}, {subnet.selector}, {times}"
    selected = f"selected in {duration(subnet.selection_s)}"
    return f"selected {amount} {purpose}: {subnet.selector}, {selected}, {times}"


def _requantization(subnet: SubNetwork) -> str:
    """Return what to say of columns of packed down projections, which were rounded again."""
    if not subnet.requantization_error:
        return ""
    return f", down projections at 8 bits (error {subnet.requantization_error:.2%})"
