"""``ifp quantize``: the same model in fewer bits."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ifp_mlx.cli import options, writing_options
from ifp_mlx.cli.progress import bytes_progress
from ifp_mlx.cli.terminal import gigabytes, print_json, say

Recipe = Literal["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model that ifp pull or ifp convert made: its name, or its folder.",
            show_default=False,
        ),
    ],
    output: writing_options.Output,
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits",
            "--q-bits",
            help="Bits of a weight: 2, 3, 4, 5, 6 or 8.",
            show_default="4, or what the mode has",
            rich_help_panel=writing_options.FORM,
        ),
    ] = None,
    group_size: writing_options.GroupSize = None,
    mode: writing_options.Mode = None,
    recipe: Annotated[
        Recipe | None,
        typer.Option(
            "--recipe",
            "--quant-predicate",
            help="One of mlx-lm's mixes of two widths, the wider one where it matters more.",
            show_default="one width",
            rich_help_panel=writing_options.FORM,
        ),
    ] = None,
    force: writing_options.Overwrite = False,
    json_output: options.AsJson = False,
) -> None:
    """Write a quantized copy of a model; it loads in mlx-lm like any other."""
    from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
    from ifp_mlx.convert.registry import resolve_model

    quantization = make_quantization(
        bits=bits, group_size=group_size, mode=mode or "affine", recipe=recipe
    )
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
