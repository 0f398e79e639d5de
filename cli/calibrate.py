"""``ifp calibrate``: measure a model's FFN units on text of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.progress import counting
from ifp_mlx.cli.terminal import plural, print_json, say, working
from ifp_mlx.errors import UsageError


def calibrate(
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE.jsonl",
            help="Text, one JSON object a line: prompt and response, messages, or text. "
            "May be compressed (.xz), may be given several times.",
        ),
    ],
    model: options.Model = options.DEFAULT_MODEL,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file to write; otherwise ifp/calibration.safetensors in the model's folder, "
            "where every command finds it.",
        ),
    ] = None,
    task_of_file: Annotated[
        bool,
        typer.Option(
            "--task-of-file",
            help="Each file is a task of its name, with a prior of its own (--selector "
            "static:NAME). Without this a record's task field names its task.",
        ),
    ] = False,
    max_length: Annotated[
        int, typer.Option("--max-length", metavar="N", min=1, help="Tokens read of each example.")
    ] = 512,
    num_examples: Annotated[
        int | None,
        typer.Option(
            "--num-examples",
            metavar="N",
            min=1,
            help="Draw this many examples at random from each file, instead of reading all.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the draw.")] = 0,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out lines that cannot be used.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure which units of a model matter on your text.

    What it finds is the prior, which the static and blend selectors go by. One pass, one example at
    a time. Take text like that of your use, never the text that you will evaluate on.
    """
    from ifp_mlx.convert.registry import resolve_model

    folder = resolve_model(model)
    target = output or folder / "ifp" / "calibration.safetensors"
    if target.exists() and not force:
        raise UsageError(f"{target} exists already; --force replaces it, -o writes another file")
    with working(f"loading {folder.name}"):
        from ifp_mlx.selection.calibration import calibrate as measure
        from ifp_mlx.storage.tokenizer import load_tokenizer
        from ifp_mlx.storage.weights import load_model
        from ifp_mlx.text.calibration_text import CalibrationLimits, calibration_examples
        from ifp_mlx.text.records import BadLines

        loaded, _ = load_model(folder)
        tokenizer = load_tokenizer(folder)
    bad = BadLines(skip=skip_bad_lines)
    limits = CalibrationLimits(max_length, num_examples, seed)
    examples = calibration_examples(data, tokenizer, limits, bad, task_of_file=task_of_file)
    with counting("measured") as count:
        calibration = measure(loaded, examples, on_example=count)
    calibration.save(target)
    for reason, number in bad.counts.items():
        say(f"left out {plural(number, 'line')}: {reason}")
    if as_json:
        record = {
            "path": str(target),
            "num_tokens": calibration.num_tokens,
            "tasks": sorted(calibration.tasks),
            "skipped_lines": dict(bad.counts),
        }
        print_json(record)
    else:
        tasks = f", tasks: {', '.join(sorted(calibration.tasks))}" if calibration.tasks else ""
        say(f"{target}: {plural(calibration.num_tokens, 'token')}{tasks}")
