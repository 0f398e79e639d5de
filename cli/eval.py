"""``ifp eval``: how much quality a sub-network keeps, measured on text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ifp_mlx.cli import measuring, options
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.overlap import HeatMaps, measure_overlap
from ifp_mlx.cli.terminal import answer_console, print_json, say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.evaluation.multiple_choice import ChoiceAccuracy
    from ifp_mlx.evaluation.rows import Row
    from ifp_mlx.evaluation.table import RowResult

_DOMAIN_COLUMNS = 8
"""With more rows than this the table by domain is too wide for a terminal: --markdown has it."""


@dataclasses.dataclass(frozen=True)
class _Report:
    rows: list[Row]
    results: list[RowResult]
    choices: dict[Row, ChoiceAccuracy]
    numbers: dict[Row, float]


@expands_options
def evaluate(
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Text that nothing was trained or calibrated on, one file for each domain: "
            "NAME.jsonl with lines of prompt and response, lm_NAME.jsonl with lines of text.",
        ),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(
            "--choices",
            metavar="FILE",
            help="Also multiple choice: the choice that the model finds likeliest is its answer. "
            "Lines of prompt, choices (a list) and answer (an index from 0), or prompt and "
            "response with options (A), (B) in the prompt.",
        ),
    ] = None,
    numbers: Annotated[
        Path | None,
        typer.Option(
            "--numbers",
            metavar="FILE",
            help="Also numbers: how many of them are answered exactly. Lines of prompt and "
            "answer, or prompt and response whose last number is the answer.",
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows",
            metavar="ROW,...",
            help="What to measure, each SELECTOR[:ARGUMENT][+CHANGE][@KEEP]: "
            "dense,static@0.67,static:math@0.5,predictor+task@768. Explained above.",
        ),
    ] = None,
    selector: Annotated[
        list[str] | None,
        typer.Option(
            "--selector",
            metavar="NAME",
            help="Instead of --rows: rows of this selector at every --keep, beside dense. "
            "May be given several times.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="AMOUNT",
            help="Share of the FFN units to keep, or their number: 0.67 or 768. May be "
            "given several times.",
        ),
    ] = None,
    per: Annotated[
        Literal["input", "task"],
        typer.Option(
            "--per", help="Select for each text, or once for each domain by its task description."
        ),
    ] = "input",
    overlap: Annotated[
        bool,
        typer.Option(
            "--overlap",
            help="Measure instead how many units the sub-networks of different texts have in "
            "common, by layer; of one selector and one --keep.",
        ),
    ] = False,
    heat_maps: HeatMaps = None,
    kl: Annotated[
        bool,
        typer.Option(
            "--kl",
            help="Also how far probabilities are from the whole model's (KL divergence), and how "
            "often the likeliest token is the same.",
        ),
    ] = False,
    limit: Annotated[
        int,
        typer.Option("--limit", min=1, metavar="N", help="Texts of each domain, the first ones."),
    ] = 20,
    max_scored: Annotated[
        int,
        typer.Option(
            "--max-scored", min=1, metavar="N", help="Tokens of each text that count; 256 at most."
        ),
    ] = 256,
    max_tokens: options.MaxTokens = 256,
    domains: measuring.Domains = None,
    tasks: measuring.Tasks = None,
    source: options.ModelOptions,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table by domain as Markdown.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure how well sub-networks predict held-out text, by domain.

    With --data alone the whole model is compared with parts of it: those that the model's own
    selector picks, those of the static prior (what ifp calibrate found) and random ones. Figures
    are cross-entropy in nats for each token, lower is better; of a prompt with a response only the
    response counts, of a document tokens 256 to 511.

    Selectors: dense (the whole model), predictor, blend[:SHARE-OF-THE-PRIOR], prompt,
    static[:TASK], domain (the prior of the text's own domain), random[:SEED].

    Changes: +task (the domain's task description selects for all its texts), +adapted (cut from the
    adapter's weights, as predictor's always are), and two controls, +fixed (the same units for
    every text) and +shuffled (each text gets the units of a text of another domain).

    With --overlap: the share of units that two sub-networks have in common. Above chance, 0 is what
    random ones have and 1 is identical. A selector that follows its input has more overlap within
    a domain than between domains.

    Example: ifp eval --data FOLDER --rows dense,static@0.67,predictor@0.5
    """
    if data is None and choices is None and numbers is None:
        raise UsageError("nothing to measure on; pass --data, --choices or --numbers")
    if rows and (selector or keep):
        raise UsageError("--rows says everything; leave out --selector and --keep")
    if as_json and markdown:
        raise UsageError("--json and --markdown exclude each other; give one")
    if markdown and data is None:
        raise UsageError("--markdown prints the table by domain; pass --data")
    if overlap and (data is None or choices or numbers or markdown or kl):
        raise UsageError("--overlap compares the sub-networks of texts; pass --data alone")
    if heat_maps is not None and not overlap:
        raise UsageError("--heat-maps draws overlaps; add --overlap")
    assistant, subject = measuring.load_subject(source, tasks)
    if overlap and selector is None:
        selector = [str(assistant.files.selector)]
    chosen = measuring.parse_rows(
        rows.split(",") if rows else _names(assistant, selector, keep), assistant
    )
    if per == "task":
        chosen = [dataclasses.replace(row, per_task=row.reads_input) for row in chosen]

    if overlap:
        assert data is not None
        compared = [row for row in chosen if row.selector != "dense"]
        if len(compared) != 1:
            raise UsageError("--overlap takes one --selector and one --keep")
        measure_overlap(
            assistant, subject, compared[0], data, limit, measuring.names(domains), heat_maps,
            as_json,
        )  # fmt: skip
        return
    from ifp_mlx.evaluation import exact_match, multiple_choice, quality, table

    results: list[RowResult] = []
    accuracies: dict[Row, ChoiceAccuracy] = {}
    shares: dict[Row, float] = {}
    with measuring.measuring() as progress:
        if data is not None:
            texts = quality.load_held_out(data, subject.tokenizer, limit, measuring.names(domains))
            texts = table.shortened(texts, max_scored)
            results = table.measure_rows(
                subject, chosen, texts, with_reference=kl, progress=progress
            )
        if choices is not None:
            questions = multiple_choice.load_questions(choices, subject.tokenizer, limit)
            accuracies = table.measure_choices(subject, chosen, questions, progress)
        if numbers is not None:
            problems = exact_match.load_problems(numbers, subject.tokenizer, limit)
            shares = table.measure_numbers(subject, chosen, problems, max_tokens, progress)
    report = _Report(chosen, results, accuracies, shares)
    if as_json:
        print_json(
            {
                "model": assistant.model_path.name,
                "num_units": assistant.num_units,
                "limit": limit,
                "max_scored": max_scored,
                "rows": _records(report),
            }
        )
    elif markdown:
        answer_console().print(table.markdown_table(results), markup=False, soft_wrap=True, end="")
    else:
        _print_tables(report)


def _names(assistant: Assistant, selectors: list[str] | None, keeps: list[str] | None) -> list[str]:
    """Return the rows that --selector and --keep ask for, or a useful first comparison."""
    if selectors is None:
        selectors = [str(assistant.files.selector)]
        if assistant.files.calibration is not None:
            selectors += ["blend", "static"]
        selectors += ["random"]
    amounts = [f"@{keep}" for keep in keeps] if keeps else [""]
    cut = [name + amount for amount in amounts for name in selectors if name != "dense"]
    return ["dense", *cut]


def _records(report: _Report) -> list[dict[str, Any]]:
    records = {row: {"row": row.label, "num_kept_units": row.num_kept_units} for row in report.rows}
    for result in report.results:
        records[result.row] |= result.to_dict()
    for row, accuracy in report.choices.items():
        records[row] |= {"multiple_choice": dataclasses.asdict(accuracy)}
    for row, share in report.numbers.items():
        records[row] |= {"exact_match": share}
    return list(records.values())


def _print_tables(report: _Report) -> None:
    from rich.table import Table

    console = answer_console()
    summary = Table(box=None, pad_edge=False)
    summary.add_column("row", overflow="fold")
    columns = _columns(report)
    for heading in columns:
        summary.add_column(heading, justify="right")
    for index, row in enumerate(report.rows):
        summary.add_row(row.label, *(column[index] for column in columns.values()))
    console.print(summary)
    if not report.results:
        return
    if len(report.results) > _DOMAIN_COLUMNS:
        say("cross-entropy by domain: --markdown or --json")
        return
    by_domain = Table(box=None, pad_edge=False, title="Cross-entropy by domain")
    by_domain.title_justify, by_domain.title_style = "left", ""
    by_domain.add_column("domain")
    for result in report.results:
        by_domain.add_column(result.row.label, justify="right", overflow="fold")
    for domain in report.results[0].qualities:
        figures = [f"{r.qualities[domain].cross_entropy:.3f}" for r in report.results]
        by_domain.add_row(domain, *figures)
    console.print()
    console.print(by_domain)


def _columns(report: _Report) -> dict[str, list[str]]:
    """Return heading -> a figure for each row, for what was measured."""
    columns: dict[str, list[str]] = {}
    for heading, is_documents in (("instructions", False), ("documents", True)):
        means = [r.mean_cross_entropy(documents=is_documents) for r in report.results]
        if means and not math.isnan(means[0]):
            columns[heading] = [f"{mean:.3f}" for mean in means]
            columns[f"perplexity ({heading})"] = [f"{math.exp(mean):.2f}" for mean in means]
    for heading, name in (("KL to dense", "kl"), ("top-1 as dense", "top1")):
        figures = [r.mean(name) for r in report.results]
        if figures and None not in figures:
            columns[heading] = [f"{figure:.3f}" for figure in figures]
    if report.choices:
        accuracies = [report.choices[row] for row in report.rows]
        chance = f"choices (chance {accuracies[0].chance:.2f})"
        columns[chance] = [f"{a.accuracy:.3f}" for a in accuracies]
        columns["per token"] = [f"{a.accuracy_per_token:.3f}" for a in accuracies]
    if report.numbers:
        columns["exact match"] = [f"{report.numbers[row]:.3f}" for row in report.rows]
    return columns
