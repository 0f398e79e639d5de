"""The measurements of a reply, as one line for people and as a dictionary for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ifp_mlx.cli.terminal import duration, gigabytes, part_of_bytes

if TYPE_CHECKING:
    from ifp_mlx.chat.generation import GenerationStats
    from ifp_mlx.subnets.subnetwork import SubNetwork


def full_statistics(subnet: SubNetwork, stats: GenerationStats) -> str:
    """Return the lines that ``--stats`` prints."""
    new_tokens = stats.prompt_tokens - stats.cached_prompt_tokens
    prompt = f"prompt {new_tokens} tokens at {stats.prompt_tps:.1f} tokens/s"
    if stats.cached_prompt_tokens:
        prompt += f" ({stats.cached_prompt_tokens} more from the KV cache)"
    part = subnet.reader or subnet
    who = "sub-network" if subnet.reader is None else "written by the whole model, read by"
    if subnet.prompt_too_short:
        who = "the whole model (selecting a part for this prompt would take longer than it saves):"
    return (
        f"{who} {_facts(part)}; selection {part.selection_s * 1000:.1f} ms"
        f"{' (cache hit)' if part.from_cache else ''}, "
        f"slicing {part.slicing_s * 1000:.1f} ms\n"
        f"{prompt}, answer {stats.generated_tokens} tokens at {stats.generation_tps:.1f} "
        f"tokens/s, first token after {duration(stats.time_to_first_token_s)}, "
        f"peak memory {gigabytes(stats.peak_memory_bytes)}, {stats.finish_reason}"
        f"{_missing(stats)}"
    )


def _facts(subnet: SubNetwork) -> str:
    share = subnet.size.parameters / subnet.source.parameters
    return (
        f"{subnet.selector}, {subnet.num_kept_units}/{subnet.num_units} {subnet.kind.label}, "
        f"{subnet.size.parameters / 1e6:.1f}M of {subnet.source.parameters / 1e6:.1f}M parameters "
        f"active ({share:.0%}), {part_of_bytes(subnet.size.num_bytes, subnet.source.num_bytes)}"
    )


def _missing(stats: GenerationStats) -> str:
    if stats.missing_share is None:
        return ""
    return f"; {stats.missing_share:.1%} of the routers' weight wanted experts that are not there"


def turn_statistics(stats: GenerationStats, used: int, context_length: int, width: int = 80) -> str:
    """Return the line below a chat's reply: speed, and how full the context is.

    Of what does not fit the width, how soon the first token came is left out first, then the bar.
    """
    stopped = {"length": " (cut at --max-tokens)", "interrupted": " (stopped)"}
    tokens = f"{stats.generated_tokens} tokens{stopped.get(stats.finish_reason, '')}"
    speed = f"{stats.generation_tps:.1f} tok/s"
    first = f"first after {duration(stats.time_to_first_token_s)}"
    meter = context_meter(used, context_length)
    return fitting_line(
        width,
        [tokens, speed, first, meter],
        [tokens, speed, meter],
        [tokens, speed, f"context {used:,}/{context_length:,}"],
        [tokens, speed],
    )


def chat_status(
    subnet: SubNetwork | None,
    task: str | None,
    model: str,
    used: int,
    context_length: int,
    width: int = 80,
) -> str:
    """Return the line at the bottom of a chat: the context, what answers, the task, the model."""
    meter = context_meter(used, context_length)
    units = [] if subnet is None else [_amount(subnet)]
    tasks = [] if task is None else [task]
    short = [f"context {used:,}/{context_length:,}", *units]
    room = max(width - sum(len(part) + 3 for part in short), 12)
    cut = [part if len(part) <= room else f"{part[: room - 1]}…" for part in tasks]
    return fitting_line(
        width, [meter, *units, *tasks, model], [meter, *units, *tasks], [*short, *tasks],
        [*short, *cut], short,
    )  # fmt: skip


def _amount(subnet: SubNetwork) -> str:
    if subnet.reader is not None:
        return f"whole model, read by {subnet.reader.num_kept_units}/{subnet.num_units} units"
    if subnet.selection is None:
        return "whole model"
    return f"{subnet.num_kept_units}/{subnet.num_units} units"


def fitting_line(width: int, *variants: list[str]) -> str:
    """Return the first variant that fits the width, its parts joined; the last if none does."""
    lines = [" · ".join(parts) for parts in variants]
    return next((line for line in lines if len(line) <= width), lines[-1])


def context_meter(used: int, context_length: int, width: int = 8) -> str:
    """Return a small bar with numbers: how much of the context the conversation takes."""
    filled = min(round(width * used / context_length), width)
    return f"context {'▰' * filled}{'▱' * (width - filled)} {used:,}/{context_length:,}"


def statistics_record(subnet: SubNetwork, stats: GenerationStats) -> dict[str, Any]:
    """Return the ``--json`` form; names carry their units."""
    return {
        "selector": str(subnet.selector),
        "read_by": None if subnet.reader is None else str(subnet.reader.selector),
        "task": subnet.task,
        "num_kept_units": subnet.num_kept_units,
        "num_units": subnet.num_units,
        "active_parameters": subnet.size.parameters,
        "total_parameters": subnet.source.parameters,
        "weights_bytes": subnet.size.num_bytes,
        "source_weights_bytes": subnet.source.num_bytes,
        "from_cache": subnet.from_cache,
        "prompt_too_short": subnet.prompt_too_short,
        "reused_task": subnet.reused_task,
        "reuse_overlap": subnet.reuse_overlap,
        "selection_ms": subnet.selection_s * 1000,
        "slicing_ms": subnet.slicing_s * 1000,
        "requantization_error": subnet.requantization_error,
        "prompt_tokens": stats.prompt_tokens,
        "cached_prompt_tokens": stats.cached_prompt_tokens,
        "prompt_tps": stats.prompt_tps,
        "generated_tokens": stats.generated_tokens,
        "generation_tps": stats.generation_tps,
        "time_to_first_token_ms": stats.time_to_first_token_s * 1000,
        "peak_memory_bytes": stats.peak_memory_bytes,
        "finish_reason": stats.finish_reason,
        "missing_share": stats.missing_share,
    }
