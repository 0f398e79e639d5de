"""The measurements of a reply, as one line for people and as a dictionary for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ifp_mlx.cli.terminal import duration, gigabytes

if TYPE_CHECKING:
    from ifp_mlx.chat.generation import GenerationStats
    from ifp_mlx.subnets.subnetwork import SubNetwork


def full_statistics(subnet: SubNetwork, stats: GenerationStats) -> str:
    """Return the lines that ``--stats`` prints."""
    share = subnet.active_parameters / subnet.total_parameters
    new_tokens = stats.prompt_tokens - stats.cached_prompt_tokens
    prompt = f"prompt {new_tokens} tokens at {stats.prompt_tps:.1f} tokens/s"
    if stats.cached_prompt_tokens:
        prompt += f" ({stats.cached_prompt_tokens} more from the KV cache)"
    return (
        f"sub-network {subnet.selector}, {subnet.num_kept_units}/{subnet.num_units} units, "
        f"{subnet.active_parameters / 1e6:.1f}M of {subnet.total_parameters / 1e6:.1f}M "
        f"parameters active ({share:.0%}); selection {subnet.selection_s * 1000:.1f} ms"
        f"{' (cache hit)' if subnet.from_cache else ''}, "
        f"slicing {subnet.slicing_s * 1000:.1f} ms\n"
        f"{prompt}, answer {stats.generated_tokens} tokens at {stats.generation_tps:.1f} "
        f"tokens/s, first token after {duration(stats.time_to_first_token_s)}, "
        f"peak memory {gigabytes(stats.peak_memory_bytes)}, {stats.finish_reason}"
    )


def turn_statistics(stats: GenerationStats, used: int, context_length: int) -> str:
    """Return the line below a chat's reply: speed, and how full the context is."""
    stopped = {"length": " (cut at --max-tokens)", "interrupted": " (stopped)"}
    parts = [
        f"{stats.generated_tokens} tokens{stopped.get(stats.finish_reason, '')}",
        f"{stats.generation_tps:.1f} tok/s",
        f"first after {duration(stats.time_to_first_token_s)}",
        context_meter(used, context_length),
    ]
    return " · ".join(parts)


def context_meter(used: int, context_length: int, width: int = 8) -> str:
    """Return a small bar with numbers: how much of the context the conversation takes."""
    filled = min(round(width * used / context_length), width)
    return f"context {'▰' * filled}{'▱' * (width - filled)} {used:,}/{context_length:,}"


def statistics_record(subnet: SubNetwork, stats: GenerationStats) -> dict[str, Any]:
    """Return the ``--json`` form; names carry their units."""
    return {
        "selector": str(subnet.selector),
        "task": subnet.task,
        "num_kept_units": subnet.num_kept_units,
        "num_units": subnet.num_units,
        "active_parameters": subnet.active_parameters,
        "total_parameters": subnet.total_parameters,
        "from_cache": subnet.from_cache,
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
    }
