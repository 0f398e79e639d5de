"""``ifp convert``: a checkpoint of another kind becomes an mlx-lm checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ifp_mlx.cli import options, writing_options
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.progress import bytes_progress
from ifp_mlx.cli.terminal import gigabytes, print_json, say
from ifp_mlx.cli.writing_options import DtypeName, dtype_named, refuse_existing


@expands_options
def convert(
    *,
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder (Hugging Face or mlx-lm), a GGUF file, or a Hugging Face id.",
            show_default=False,
        ),
    ],
    output: writing_options.Output,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(
            help="Floating type to store. Folders keep theirs; GGUF files become float32, which is "
            "exact, on a CPU and bfloat16 on a GPU.",
            show_default="as described",
        ),
    ] = None,
    quantization_flags: writing_options.QuantizationFlags,
    unit_major: Annotated[
        bool,
        typer.Option(
            "--unit-major",
            help="Also store the FFN units one by one, as ifp prepare does, for fast loading.",
        ),
    ] = False,
    force: writing_options.Overwrite = False,
    json_output: options.AsJson = False,
) -> None:
    """Convert a model into a folder that ifp and mlx-lm can read."""
    from ifp_mlx.convert.conversion import convert_checkpoint
    from ifp_mlx.convert.hub import fetch_from_hub, is_hub_id
    from ifp_mlx.storage.origin import Origin

    refuse_existing(output, force=force)
    quantization = quantization_flags.quantization
    with bytes_progress() as progress:
        path, origin = Path(source).expanduser(), None
        if not path.exists() and is_hub_id(source):
            snapshot = fetch_from_hub(source, progress)
            path = snapshot.path
            origin = Origin(
                base_model=source, source=f"Hugging Face hub, {source} at {snapshot.revision}"
            )
        made = convert_checkpoint(
            path,
            output,
            dtype=dtype_named(dtype),
            quantization=quantization,
            unit_major=unit_major,
            overwrite=force,
            origin=origin,
            progress=progress,
        )
    if json_output:
        print_json(
            {
                "path": str(made.path),
                "model_type": made.model_type,
                "dtype": made.dtype,
                "num_bytes": made.num_bytes,
            }
        )
        return
    say(f"{made.path}: {made.model_type}, {made.dtype}, {gigabytes(made.num_bytes)}")
