"""Flags that the commands share that write models, and what they mean to the library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    import mlx.core as mx

    from ifp_mlx.convert.quantize import Quantization

FORM = "Written form"
"""The heading of these flags in the help."""

DtypeName = Literal["float32", "float16", "bfloat16"]
ModeName = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]

Output = Annotated[
    Path, typer.Option("--output", "-o", help="The folder to create.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        "--q-group-size",
        help="Weights that share a scale: 32, 64 or 128.",
        show_default="64, or what the mode has",
        rich_help_panel=FORM,
    ),
]
Mode = Annotated[
    ModeName | None,
    typer.Option(
        "--mode",
        "--q-mode",
        help="Quantize in this number format.",
        show_default="affine",
        rich_help_panel=FORM,
    ),
]


@dataclasses.dataclass(frozen=True)
class QuantizationFlags:
    """Whether and how what is written is quantized."""

    quantize: Annotated[
        int | None,
        typer.Option(
            "--quantize",
            "--q-bits",
            metavar="BITS",
            help="Quantize the weights to this many bits: 2, 3, 4, 5, 6 or 8.",
            show_default="no",
            rich_help_panel=FORM,
        ),
    ] = None
    group_size: GroupSize = None
    mode: Mode = None

    @property
    def quantization(self) -> Quantization | None:
        """The library's form, None if no flag asks for it.

        Raises:
            UsageError: a group size alone, or what MLX does not have.
        """
        if self.quantize is None and self.mode is None:
            if self.group_size is not None:
                raise UsageError("--group-size needs --quantize BITS or --mode")
            return None
        from ifp_mlx.convert.quantize import make_quantization

        return make_quantization(
            bits=self.quantize, group_size=self.group_size, mode=self.mode or "affine"
        )


def dtype_named(name: str | None) -> mx.Dtype | None:
    """Return the mlx type with this name."""
    if name is None:
        return None
    import mlx.core as mx

    dtype: mx.Dtype = getattr(mx, name)
    return dtype


def refuse_existing(target: Path, *, force: bool) -> None:
    """Refuse to write over something, before any work is done for it.

    Raises:
        UsageError: the target exists, and nobody said to replace it.
    """
    if target.exists() and not force:
        raise UsageError(f"{target} exists already; choose another name or pass --force")
