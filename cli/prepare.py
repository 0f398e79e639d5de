"""``ifp convert MODEL --unit-major``: store a model's FFN units one by one, for fast loading."""

from __future__ import annotations

from typing import Annotated

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.progress import bytes_progress
from ifp_mlx.cli.terminal import gigabytes, print_json, say


def prepare(
    model: options.Model = options.DEFAULT_MODEL,
    force: Annotated[
        bool, typer.Option("--force", help="Write the file again, even if it is there and fits.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Store a model's FFN units one by one beside it, for fast loading with little memory.

    The file ifp/units.safetensors in the model's folder holds the FFN weights a second time, so
    that loading a sub-network reads only what it keeps. Deleting it costs nothing but that.
    """
    from ifp_mlx.convert.registry import resolve_model
    from ifp_mlx.slicing.unit_file import UNIT_FILE, unit_file_is_current, write_unit_file

    path = resolve_model(model)
    target = path / UNIT_FILE
    written = force or not unit_file_is_current(path)
    if written:
        with bytes_progress() as progress:
            write_unit_file(path, on_bytes=lambda done, total: progress("preparing", done, total))
    size_bytes = target.stat().st_size
    if as_json:
        print_json({"path": str(target), "size_bytes": size_bytes, "written": written})
        return
    how = "wrote" if written else "nothing to do:"
    say(f"{how} {target}, {gigabytes(size_bytes)}")
