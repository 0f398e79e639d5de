"""``ifp bench``: latency, slicing and switching, measured on this machine."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from ifp_mlx.cli.help_sections import CommandGroup
from ifp_mlx.cli.measuring import measuring
from ifp_mlx.cli.options import AsJson
from ifp_mlx.cli.terminal import print_json, say

app = CommandGroup("Measure how fast this machine answers, slices models and changes tasks.")

ShapeName = Annotated[
    str,
    typer.Option(
        "--shape",
        metavar="NAME",
        help="The size of the model, whose weights are random: llama-3.1-8b, paper-9b, "
        "smollm2-135m, wide-8-layers, qwen1.5-moe-a2.7b, qwen3-30b-a3b, tiny, or a config.json.",
    ),
]
PredictorConfig = Annotated[
    str,
    typer.Option(
        "--predictor-config",
        metavar="NAME",
        help="The size of the model that selects: qwen2.5-0.5b, smollm2-135m, tiny, or a "
        "config.json.",
    ),
]
KeepUnits = Annotated[
    list[int] | None,
    typer.Option(
        "--keep-units", metavar="K", help="FFN units to keep. May be given several times."
    ),
]
Bits = Annotated[
    int,
    typer.Option("--bits", metavar="N", help="Bits of a weight: 16 is plain, fewer is quantized."),
]
DType = Annotated[
    str,
    typer.Option("--dtype", metavar="TYPE", help="Type of numbers: bfloat16, float16 or float32."),
]
NumRepeats = Annotated[
    int, typer.Option("--repeats", min=1, metavar="N", help="Times each measurement is taken.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Also write the results there, as JSON."),
]


@app.command("latency")
def latency(
    context: typer.Context,
    shape: ShapeName = "smollm2-135m",
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="FOLDER", help="A real model instead of a size."),
    ] = None,
    predictor_config: PredictorConfig = "smollm2-135m",
    keep_units: KeepUnits = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(
            "--prompt",
            min=2,
            metavar="TOKENS",
            help="Length of the prompt. May be given several times. [default: 2048 4096]",
        ),
    ] = None,
    new_tokens: Annotated[
        int,
        typer.Option(
            "--new-tokens", min=0, metavar="N", help="Tokens of each answer; 0 times no writing."
        ),
    ] = 100,
    samples: Annotated[
        int, typer.Option("--samples", min=1, metavar="N", help="Answers to one prompt, read once.")
    ] = 1,
    bits: Bits = 16,
    dtype: DType = "bfloat16",
    repeats: NumRepeats = 5,
    decode_repeats: Annotated[
        int,
        typer.Option("--decode-repeats", min=1, metavar="N", help="Times that writing is timed."),
    ] = 3,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A first look, in less than a minute for the default size: 64 tokens read, 8 "
            "written, each timed twice; on a CPU in float32, as ifp computes there. The options "
            "above then count only if they are given.",
        ),
    ] = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time reading and writing: the whole model, a small one of the same size, sub-networks."""
    from ifp_mlx.benchmarking import report, runs
    from ifp_mlx.benchmarking.latency import Workload
    from ifp_mlx.benchmarking.timing import Repeats, computes_on_cpu

    is_given = functools.partial(_is_given, context)
    warmups = 1 if quick else 2
    if quick:
        prompt = prompt or [64]
        new_tokens = new_tokens if is_given("new_tokens") else 8
        repeats = repeats if is_given("repeats") else 2
        decode_repeats = decode_repeats if is_given("decode_repeats") else 2
        if computes_on_cpu() and not is_given("dtype"):
            dtype = "float32"
    with measuring() as progress:

        def on_part(content: dict[str, Any]) -> None:
            last = content["rows"][-1]
            say(f"{shape}: {last['prompt_tokens']} prompt tokens, K={last['num_kept_units']} done")
            if output is not None:
                report.write_document(output, content)

        content = runs.run_latency(
            runs.ModelOptions(shape, keep_units or (), predictor_config, bits, dtype, model),
            [Workload(tokens, new_tokens, samples) for tokens in prompt or (2048, 4096)],
            repeats=Repeats(repeats, warmups),
            decode_repeats=decode_repeats,
            on_part=on_part,
            on_turn=progress,
        )
    _show(content, report.latency_table(content["rows"]), output, as_json)


@app.command("slicing")
def slicing(
    shape: ShapeName = "smollm2-135m",
    keep_units: KeepUnits = None,
    bits: Bits = 16,
    dtype: DType = "bfloat16",
    repeats: NumRepeats = 9,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time gathering FFN units in several ways, beside a plain copy of as many bytes."""
    from ifp_mlx.benchmarking import report, runs
    from ifp_mlx.benchmarking.timing import Repeats

    options = runs.ModelOptions(shape, keep_units or (), bits=bits, dtype=dtype)
    content = runs.run_slicing(options, repeats=Repeats(repeats))
    _show(content, report.slicing_table(content["rows"]), output, as_json)


@app.command("switch")
def switch(
    shape: ShapeName = "smollm2-135m",
    predictor_config: PredictorConfig = "smollm2-135m",
    keep_units: KeepUnits = None,
    tasks: Annotated[
        list[int] | None,
        typer.Option(
            "--tasks",
            metavar="N",
            help="How many tasks take turns. May be given several times. [default: 1 2 5 10 20]",
        ),
    ] = None,
    prompt: Annotated[
        int,
        typer.Option(
            "--prompt", min=1, metavar="TOKENS", help="Length of the prompt after each change."
        ),
    ] = 64,
    bits: Bits = 16,
    dtype: DType = "bfloat16",
    repeats: NumRepeats = 9,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time changing the task: one in memory, one that is cached, and one never seen before."""
    from ifp_mlx.benchmarking import report, runs
    from ifp_mlx.benchmarking.timing import Repeats

    content = runs.run_switching(
        runs.ModelOptions(shape, keep_units or (), predictor_config, bits, dtype),
        task_counts=tasks or [1, 2, 5, 10, 20],
        prompt_tokens=prompt,
        repeats=Repeats(repeats),
    )
    _show(content, report.switch_table(content["rows"]), output, as_json)


def _is_given(context: typer.Context, name: str) -> bool:
    """Return whether an option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _show(content: dict[str, Any], table: str, output: Path | None, as_json: bool) -> None:
    from ifp_mlx.benchmarking.report import write_document

    if output is not None:
        write_document(output, content)
    if as_json:
        print_json(content)
        return
    machine = content["machine"]
    typer.echo(
        f"{content['shape']}, {content['bits']} bits, {content['dtype']}; {machine['device']} "
        f"({machine['backend']}), mlx {machine['mlx']}, mlx-lm {machine['mlx_lm']}, "
        f"{machine['date']}; {content['repeats']} repeats; times in ms, memory in GB\n"
    )
    typer.echo(table)
