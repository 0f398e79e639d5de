"""``ifp doctor``: what this machine has, what fits on it, and whether it computes right."""

from __future__ import annotations

import platform
import shutil
import sys
from typing import Annotated, Any

import typer

from ifp_mlx import __version__
from ifp_mlx.blas import ADVICE
from ifp_mlx.cli import options
from ifp_mlx.cli.terminal import answer_console, gigabytes, plural, print_json, working

_CONTEXT_TOKENS = 4096
_PACKAGES = ("mlx", "mlx-lm", "transformers", "huggingface-hub", "numpy", "safetensors")


def doctor(
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Also check that slicing, caching and the kernels are exact here, time a small "
            "model, and print a block to paste into an issue.",
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Look at this machine: what it has, which models fit, and whether it computes right."""
    with working("looking around"):
        facts: dict[str, Any] = {
            "versions": _versions(),
            "backend": _backend(),
            "folders": _folders(),
            "models": _models(),
        }
    if self_test:
        with working("checking and measuring"):
            facts["self_test"] = _self_test()
    if as_json:
        print_json(facts)
    elif self_test:
        typer.echo(_issue_block(facts))
    else:
        _show(facts)
    if self_test and not all(check["passed"] for check in facts["self_test"]["checks"]):
        raise typer.Exit(1)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"ifp": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _backend() -> dict[str, Any]:
    import mlx.core as mx

    from ifp_mlx.blas import is_loaded
    from ifp_mlx.subnets.memory import usable_memory_bytes

    device = mx.default_device()
    info = mx.device_info()
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "device": str(device),
        "device_name": str(info.get("device_name", platform.processor() or "unknown")),
        "metal": mx.metal.is_available(),
        "cuda": mx.cuda.is_available(),
        "usable_memory_bytes": usable_memory_bytes(),
    }
    if sys.platform == "linux" and device == mx.cpu:
        facts["openblas"] = is_loaded()
    return facts


def _folders() -> dict[str, Any]:
    from ifp_mlx.chat.session import list_sessions
    from ifp_mlx.storage.home import (
        home_folder,
        models_folder,
        sessions_folder,
        subnet_cache_folder,
    )
    from ifp_mlx.subnets.compact_store import stored_bytes
    from ifp_mlx.subnets.task_cache import TaskCache

    cache = TaskCache(subnet_cache_folder())
    entries = cache.entries()
    existing = home_folder()
    while not existing.exists():
        existing = existing.parent
    return {
        "models": str(models_folder()),
        "subnet_cache": str(subnet_cache_folder()),
        "cached_subnetworks": len(entries),
        "cache_bytes": sum(entry.size_bytes for entry in entries),
        "cached_weight_bytes": stored_bytes(cache.compact_folder),
        "sessions": str(sessions_folder()),
        "saved_chats": len(list_sessions(sessions_folder())),
        "free_disk_bytes": shutil.disk_usage(existing).free,
    }


def _models() -> list[dict[str, Any]]:
    from ifp_mlx.errors import IFPError
    from ifp_mlx.storage.home import models_folder
    from ifp_mlx.subnets.fits import what_fits
    from ifp_mlx.subnets.memory import checkpoint_sizes, usable_memory_bytes

    found: list[dict[str, Any]] = []
    for config in sorted(models_folder().glob("*/config.json")):
        folder = config.parent
        facts: dict[str, Any] = {"name": folder.name, "path": str(folder)}
        facts["is_default"] = folder.name == options.DEFAULT_MODEL
        try:
            sizes = checkpoint_sizes(folder)
        except IFPError as error:
            facts["problem"] = str(error)
        else:
            available = usable_memory_bytes()
            facts |= {
                "num_units": sizes.amounts.num_units,
                "dense_bytes": sizes.predict(sizes.amounts.num_units, _CONTEXT_TOKENS).total_bytes,
                "context_tokens": _CONTEXT_TOKENS,
                "smallest_k": sizes.amounts.least,
                "largest_k": sizes.largest_k_that_fits(_CONTEXT_TOKENS, available),
                "unit_label": sizes.amounts.label,
                "fits": what_fits(
                    sizes, context_tokens=_CONTEXT_TOKENS, limit_bytes=available
                ).line(),
            }
        found.append(facts)
    return found


def _self_test() -> dict[str, Any]:
    from ifp_mlx.slicing.self_test import measure_speed, run_checks

    checks = [
        {"name": c.name, "error": c.error, "limit": c.limit, "passed": c.passed}
        for c in run_checks()
    ]
    speeds = [
        {
            "num_kept_units": s.num_kept_units,
            "num_parameters": s.num_parameters,
            "tokens_per_s": round(s.tokens_per_s, 1),
        }
        for s in measure_speed()
    ]
    return {"checks": checks, "decoding": speeds}


def _show(facts: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(facts):
        table.add_row(name, Text(value))
    answer_console().print(table)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is printed for people: name, text."""
    backend, folders = facts["backend"], facts["folders"]
    usable = gigabytes(backend["usable_memory_bytes"])
    lines = [
        ("versions", ", ".join(f"{name} {value}" for name, value in facts["versions"].items())),
        ("machine", f"{backend['platform']}, {backend['device_name']}, {usable} usable memory"),
        ("backend", _describe_backend(backend)),
    ]
    if not facts["models"]:
        lines.append(("models", f"none yet; run: ifp pull {options.DEFAULT_MODEL}"))
    for model in facts["models"]:
        lines.append(("model", _describe_model(model)))
    cached = plural(folders["cached_subnetworks"], "sub-network")
    num_bytes = folders["cache_bytes"] + folders["cached_weight_bytes"]
    lines += [
        ("cache", f"{cached}, {gigabytes(num_bytes)} in {folders['subnet_cache']}"),
        ("chats", f"{folders['saved_chats']} saved in {folders['sessions']}"),
        ("disk", f"{gigabytes(folders['free_disk_bytes'])} free for {folders['models']}"),
    ]
    return lines


def _describe_backend(backend: dict[str, Any]) -> str:
    if backend["metal"]:
        return "Metal"
    if backend["cuda"]:
        return "CUDA"
    if backend.get("openblas") is False:
        return f"CPU; {ADVICE}"
    return "CPU with OpenBLAS" if backend.get("openblas") else "CPU"


def _describe_model(model: dict[str, Any]) -> str:
    name = f"{model['name']}{' (default)' if model['is_default'] else ''}"
    if "problem" in model:
        return f"{name}: {model['problem']}"
    at_context = f"at {model['context_tokens']:,} tokens of context"
    dense = f"dense needs {gigabytes(model['dense_bytes'])} {at_context}"
    if model["largest_k"] == model["num_units"]:
        return f"{name}: {dense}, which fits"
    if model["largest_k"] is None:
        return f"{name}: {dense}; not even {model['smallest_k']} {model['unit_label']} fit"
    most = f"--keep-units {model['largest_k']} of {model['num_units']} is the most that fits"
    return f"{name}: {model['fits']} ({at_context}); {most}"


def _issue_block(facts: dict[str, Any]) -> str:
    """Return Markdown to paste into an issue; folders are left out, they hold the user's name."""
    lines = ["```text", f"ifp doctor --self-test, ifp {__version__}"]
    lines += [f"{name}: {text}" for name, text in _lines(facts)[:3]]
    test = facts["self_test"]
    for check in test["checks"]:
        mark = "ok  " if check["passed"] else "FAIL"
        lines.append(f"{mark} {check['name']}: {check['error']:.2g} (limit {check['limit']:.0e})")
    lines.append("decoding a random model, batch 1:")
    for speed in test["decoding"]:
        parameters = f"{speed['num_parameters'] / 1e6:.0f}M parameters"
        lines.append(
            f"     K = {speed['num_kept_units']:>4}: {parameters:>16}, "
            f"{speed['tokens_per_s']:>7.1f} tokens/s"
        )
    return "\n".join([*lines, "```"])
