"""``ifp convert``: a checkpoint of another kind becomes an mlx-lm checkpoint directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ifp_mlx.cli import options, writing_options
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.prepare import prepare
from ifp_mlx.cli.progress import bytes_progress
from ifp_mlx.cli.terminal import gigabytes, print_json, say
from ifp_mlx.cli.writing_options import DtypeName, dtype_named, refuse_existing
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    from ifp_mlx.units.model_config import ModelConfig


@expands_options
def convert(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A checkpoint folder (Hugging Face or mlx-lm), a GGUF file, or a Hugging Face id.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="The folder to create. Needed, but for --unit-major of a model that is there.",
        ),
    ] = None,
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
            help="Also store the units of the FFN layers one by one, in ifp/units.safetensors: a "
            "sub-network is then loaded by reading nothing else, in little memory. Without "
            "--output this is done to the model itself, beside its weights; deleting the file "
            "undoes it.",
        ),
    ] = False,
    force: writing_options.Overwrite = False,
    json_output: options.AsJson = False,
) -> None:
    """Convert a model into a folder that ifp and mlx-lm can read.

    Examples: ifp convert model.gguf -o my-model;
    ifp convert ORG/NAME -o my-small-model --quantize 4;
    ifp convert my-small-model --unit-major
    """
    if output is None:
        if not unit_major or dtype is not None or quantization_flags.quantization is not None:
            raise UsageError("a converted model needs a folder of its own; name it with --output")
        prepare(source, force, json_output)
        return
    from ifp_mlx.convert.conversion import convert_checkpoint
    from ifp_mlx.convert.hub import fetch_from_hub, is_hub_id
    from ifp_mlx.storage.config_file import read_config
    from ifp_mlx.storage.origin import Origin
    from ifp_mlx.subnets.fits import advice_before_fetching

    def look(config: ModelConfig) -> None:
        packing = None if quantization is None else dataclasses.asdict(quantization)
        for line in advice_before_fetching(config, dtype_named(dtype), packing):
            say(line)

    refuse_existing(output, force=force)
    quantization = quantization_flags.quantization
    with bytes_progress() as progress:
        path, origin = Path(source).expanduser(), None
        if not path.exists() and is_hub_id(source):
            snapshot = fetch_from_hub(source, progress, look)
            path = snapshot.path
            origin = Origin(
                base_model=source, source=f"Hugging Face hub, {source} at {snapshot.revision}"
            )
        elif path.is_dir():
            look(read_config(path))
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
