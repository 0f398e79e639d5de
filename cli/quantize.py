"""``ifp quantize``: the same model in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ifp_mlx.cli.progress import bytes_progress
from ifp_mlx.cli.terminal import gigabytes, print_json, say

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
Recipe = Literal["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            help="A model that ifp pull or ifp convert made: its name, or its folder.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to create.", show_default=False)
    ],
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits",
            "--q-bits",
            help="Bits of a weight: 2, 3, 4, 5, 6 or 8.",
            show_default="4, or what the mode has",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            "--q-group-size",
            help="Weights that share a scale: 32, 64 or 128.",
            show_default="64, or what the mode has",
        ),
    ] = None,
    mode: Annotated[Mode, typer.Option("--mode", "--q-mode", help="The number format.")] = "affine",
    recipe: Annotated[
        Recipe | None,
        typer.Option(
            "--recipe",
            "--quant-predicate",
            help="One of mlx-lm's mixes of two widths, the wider one where it matters more.",
            show_default="one width",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output folder if it exists.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on standard output.")
    ] = False,
) -> None:
    """Write a quantized copy of a model; it loads in mlx-lm like any other."""
    from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
    from ifp_mlx.convert.registry import resolve_model

    quantization = make_quantization(bits=bits, group_size=group_size, mode=mode, recipe=recipe)
    with bytes_progress() as progress:
        made = quantize_checkpoint(
            resolve_model(model), output, quantization, overwrite=force, progress=progress
        )
    if json_output:
        print_json(
            {
                "path": str(made.path),
                "bytes_before": made.bytes_before,
                "bytes_after": made.bytes_after,
                "bits_per_weight": made.bits_per_weight,
                "num_plain": made.num_plain,
                **quantization.settings,
                "recipe": recipe,
            }
        )
        return
    say(
        f"{made.path}: {gigabytes(made.bytes_before)} became {gigabytes(made.bytes_after)}, "
        f"{made.bits_per_weight:.2f} bits a weight"
    )
    if made.num_plain:
        say(
            f"{made.num_plain} of the matrices stayed plain: their width is no multiple "
            f"of {quantization.group_size}"
        )
