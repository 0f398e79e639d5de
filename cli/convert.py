"""``ifp convert``: a checkpoint of another kind becomes an mlx-lm checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ifp_mlx.cli.progress import bytes_progress
from ifp_mlx.cli.terminal import gigabytes, print_json, say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    import mlx.core as mx

DtypeName = Literal["float32", "float16", "bfloat16"]


def dtype_named(name: str | None) -> mx.Dtype | None:
    """Return the mlx type with this name."""
    if name is None:
        return None
    import mlx.core as mx

    dtype: mx.Dtype = getattr(mx, name)
    return dtype


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder (Hugging Face or mlx-lm), a GGUF file, or a Hugging Face id.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to create.", show_default=False)
    ],
    dtype: Annotated[
        DtypeName | None,
        typer.Option(
            help="Floating type to store. Folders keep theirs; GGUF files become float32, which is "
            "exact, on a CPU and bfloat16 on a GPU.",
            show_default="as described",
        ),
    ] = None,
    quantize: Annotated[
        int | None,
        typer.Option(
            "--quantize",
            "--q-bits",
            metavar="BITS",
            help="Quantize to this many bits; ifp quantize has more choices.",
            show_default="no",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            "--q-group-size",
            help="Weights that share a scale, with --quantize.",
            show_default="64",
        ),
    ] = None,
    unit_major: Annotated[
        bool,
        typer.Option(
            "--unit-major",
            help="Also store the FFN units one by one, as ifp prepare does, for fast loading.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output folder if it exists.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on standard output.")
    ] = False,
) -> None:
    """Convert a model into a folder that ifp and mlx-lm can read."""
    from ifp_mlx.convert.conversion import convert_checkpoint
    from ifp_mlx.convert.hub import fetch_from_hub, is_hub_id
    from ifp_mlx.convert.quantize import make_quantization
    from ifp_mlx.origin import Origin

    if output.exists() and not force:
        raise UsageError(f"{output} exists already; choose another name or pass --force")
    if group_size is not None and quantize is None:
        raise UsageError("--group-size needs --quantize BITS")
    quantization = None
    if quantize is not None:
        quantization = make_quantization(bits=quantize, group_size=group_size)
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
