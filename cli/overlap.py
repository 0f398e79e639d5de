"""``ifp eval --overlap``: whether different inputs get different sub-networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ifp_mlx.cli import measuring, options
from ifp_mlx.cli.loading import num_kept_units
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.terminal import answer_console, print_json, say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.evaluation.overlap import Overlap
    from ifp_mlx.evaluation.rows import Row
    from ifp_mlx.evaluation.subject import Subject


HeatMaps = Annotated[
    Path | None,
    typer.Option(
        "--heat-maps",
        metavar="FOLDER",
        help="With --overlap: draw the first, middle and last layer, as PNG files (needs "
        "matplotlib).",
    ),
]


@expands_options
def overlap(
    *,
    data: measuring.Data,
    selector: Annotated[
        str,
        typer.Option(
            "--selector",
            metavar="NAME",
            help="What picks the units, written as in ifp eval: predictor, blend, prompt, domain, "
            "predictor+task; auto takes the best that this model has.",
        ),
    ] = "auto",
    amount: options.Amount,
    limit: Annotated[
        int,
        typer.Option("--limit", min=2, metavar="N", help="Texts of each domain, the first ones."),
    ] = 20,
    domains: measuring.Domains = None,
    tasks: measuring.Tasks = None,
    heat_maps: HeatMaps = None,
    source: options.ModelOptions,
    as_json: options.AsJson = False,
) -> None:
    """Measure how much the sub-networks of different inputs have in common, by layer."""
    assistant, subject = measuring.load_subject(source, tasks)
    kept = num_kept_units(assistant, amount)
    name = str(assistant.files.selector) if selector == "auto" else selector
    if not name.startswith("dense"):
        name = f"{name}@{kept}"
    (row,) = measuring.parse_rows([name], assistant)
    measure_overlap(
        assistant, subject, row, data, limit, measuring.names(domains), heat_maps, as_json
    )


def measure_overlap(
    assistant: Assistant,
    subject: Subject,
    row: Row,
    data: Path,
    limit: int,
    domains: list[str] | None,
    heat_maps: Path | None,
    as_json: bool,
) -> None:
    """Measure and print what the sub-networks of one row have in common.

    Raises:
        UsageError: the row is the whole model, or the texts do not suffice.
    """
    from ifp_mlx.evaluation.heat_maps import write_heat_maps
    from ifp_mlx.evaluation.overlap import overlap as overlap_of
    from ifp_mlx.evaluation.quality import load_held_out

    inputs = load_held_out(data, subject.tokenizer, limit, domains)
    subject.check(row, inputs)
    together = [example for domain_inputs in inputs.values() for example in domain_inputs]
    with measuring.measuring() as progress:
        masks = subject.masks([row], together, progress)[row]
    if masks is None:
        raise UsageError("the whole model has no sub-networks to compare; choose a selector")
    analysis = overlap_of(masks)
    paths = write_heat_maps(analysis, heat_maps) if heat_maps is not None else []
    if as_json:
        facts = {
            "row": row.label,
            "num_kept_units": row.num_kept_units,
            "num_units": assistant.num_units,
        }
        print_json({**facts, **analysis.to_dict(), "heat_maps": [str(path) for path in paths]})
    else:
        _print_overlap(analysis)
        for path in paths:
            say(f"drew {path}")


def _print_overlap(analysis: Overlap) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "within", "between", "within, above chance", "between, above chance"):
        table.add_column(heading, justify="right")
    above = [analysis.above_chance(figures) for figures in (analysis.within, analysis.between)]
    columns = [analysis.within, analysis.between, *above]
    for layer in range(len(analysis.by_layer)):
        table.add_row(str(layer + 1), *(f"{column[layer]:.3f}" for column in columns))
    table.add_row("mean", *(f"{column.mean():.3f}" for column in columns))
    console = answer_console()
    console.print(table)
    say(
        f"{len(analysis.domains)} domains, {sum(analysis.num_inputs)} inputs, "
        f"chance {analysis.chance:.3f}"
    )
