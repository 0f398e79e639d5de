"""From flags to an assistant and a sub-network, and the lines that say what was done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ifp_mlx.cli.terminal import duration, say, working
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.selection.selection import Selection
    from ifp_mlx.subnets.compact_models import SubNetwork

_TITLE_CHARACTERS = 60


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """What the flags say about the model and how its sub-networks are picked."""

    model: str
    adapter: Path | None = None
    no_adapter: bool = False
    selector: str = "auto"
    compensate: bool = False
    reuse: float | None = None
    use_cache: bool = True
    force: bool = False
    exact_down: bool = False


@dataclasses.dataclass(frozen=True)
class SubnetChoice:
    """What the flags say about one sub-network."""

    task: str | None = None
    keep: float | None = None
    keep_units: int | None = None
    dense: bool = False
    examples: tuple[str, ...] = ()

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model is needed for sure: to answer, or to read the first message."""
        return self.dense or self.task is None

    def __post_init__(self) -> None:
        """Refuse flags that exclude each other, before a model is loaded for them."""
        if self.keep is not None and self.keep_units is not None:
            raise UsageError("--keep and --keep-units exclude each other; give one")
        if self.dense and (self.keep is not None or self.keep_units is not None):
            raise UsageError("--dense keeps every unit; leave out --keep and --keep-units")
        if self.task is not None and not self.task.strip():
            raise UsageError("--task is empty; describe the task in a sentence, or leave it out")


def load_assistant(choice: ModelChoice, *, preload: bool = True) -> Assistant:
    """Load the model that the flags name, with a spinner while that takes.

    Args:
        choice: the flags.
        preload: False leaves the dense model alone until something needs it.
    """
    if choice.adapter is not None and choice.no_adapter:
        raise UsageError("--adapter and --no-adapter exclude each other; give one")
    with working(f"loading {Path(choice.model).name}"):
        from ifp_mlx.assistant import Assistant
        from ifp_mlx.convert.registry import resolve_model
        from ifp_mlx.storage.home import subnet_cache_folder
        from ifp_mlx.subnets.task_cache import SubNetCache

        cache = SubNetCache(subnet_cache_folder(), on_warning=say) if choice.use_cache else None
        return Assistant.load(
            resolve_model(choice.model),
            adapter=choice.adapter,
            use_adapter=not choice.no_adapter,
            selector=None if choice.selector == "auto" else choice.selector,
            compensate=choice.compensate,
            cache=cache,
            reuse_threshold=choice.reuse,
            exact_down=choice.exact_down,
            force=choice.force,
            preload=preload,
            on_warning=say,
        )


def num_kept_units(assistant: Assistant, choice: SubnetChoice) -> int:
    """Return K for the flags; says so when ``--keep`` had to be rounded.

    Raises:
        UsageError: out of range, or not a multiple of 64.
    """
    from ifp_mlx.units.amounts import check_keep_units, round_keep_ratio

    if choice.keep_units is not None:
        return check_keep_units(choice.keep_units, assistant.num_units)
    if choice.keep is None:
        return assistant.default_num_kept_units
    kept = round_keep_ratio(choice.keep, assistant.num_units)
    if kept != choice.keep * assistant.num_units:
        say(
            f"--keep {choice.keep:g} is {kept} of {assistant.num_units} units "
            f"({kept / assistant.num_units:.3f}), the nearest multiple of 64"
        )
    return kept


def choose_subnetwork(assistant: Assistant, choice: SubnetChoice, first_message: str) -> SubNetwork:
    """Return the sub-network for the task, or for the first message if there is no task."""
    if choice.dense:
        return assistant.dense()
    kept = num_kept_units(assistant, choice)
    with working("preparing the sub-network"):
        if choice.task is not None:
            return assistant.subnetwork_for_task(choice.task, kept, choice.examples)
        return assistant.subnetwork_for_prompt(first_message, kept)


def describe_subnetwork(subnet: SubNetwork) -> str:
    """Return the line that says which sub-network answers, and where it came from."""
    if subnet.selection is None:
        return f"dense: all {subnet.num_units} FFN units of each layer"
    amount = f"{subnet.num_kept_units} of {subnet.num_units} FFN units"
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


def mean_overlap(one: Selection, other: Selection) -> float:
    """Return the share of units that two selections have in common, the mean over layers."""
    return cast(float, one.overlap(other).mean().item())


def title(text: str | None) -> str:
    """Return a text as one short line."""
    line = " ".join((text or "").split())
    return line if len(line) <= _TITLE_CHARACTERS else f"{line[: _TITLE_CHARACTERS - 1]}…"
