"""``ifp bench``: latency, slicing and switching, measured on this machine."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ifp_mlx.cli.options import AsJson
from ifp_mlx.cli.terminal import print_json, say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure latency, slicing and task switching on this machine.",
)

ShapeName = Annotated[
    str,
    typer.Option(
        "--shape",
        metavar="NAME",
        help="llama-3.1-8b, paper-9b, smollm2-135m, wide-8-layers, qwen1.5-moe-a2.7b, "
        "qwen3-30b-a3b, tiny, or a config.json; the weights are random.",
    ),
]
PredictorConfig = Annotated[
    str,
    typer.Option(
        "--predictor-config",
        metavar="NAME",
        help="What selects: qwen2.5-0.5b, smollm2-135m, tiny, or a config.json.",
    ),
]
KeepUnits = Annotated[
    list[int] | None,
    typer.Option("--keep-units", metavar="K", help="FFN units to keep; may be repeated."),
]
Bits = Annotated[
    int, typer.Option("--bits", metavar="N", help="16 for plain weights; fewer quantizes them.")
]
DType = Annotated[
    str, typer.Option("--dtype", metavar="TYPE", help="bfloat16, float16 or float32.")
]
NumRepeats = Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="Counted repeats.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Also write the results there, as JSON."),
]


@app.command()
def latency(
    shape: ShapeName = "smollm2-135m",
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="FOLDER", help="A real checkpoint instead of a shape."),
    ] = None,
    predictor_config: PredictorConfig = "smollm2-135m",
    keep_units: KeepUnits = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(
            "--prompt",
            min=2,
            metavar="TOKENS",
            help="Prompt length; may be repeated. [default: 2048 4096]",
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=0, help="Tokens a sample; 0 times no decoding.")
    ] = 100,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Samples of one prompt, sharing its prefill.")
    ] = 1,
    bits: Bits = 16,
    dtype: DType = "bfloat16",
    repeats: NumRepeats = 5,
    decode_repeats: Annotated[
        int, typer.Option("--decode-repeats", min=1, metavar="N", help="Repeats of decoding.")
    ] = 3,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time to first token and decoding: dense, small dense, and our sub-networks."""
    from ifp_mlx.benchmarking import report, runs
    from ifp_mlx.benchmarking.latency import Workload
    from ifp_mlx.benchmarking.timing import Repeats

    def on_part(content: dict[str, Any]) -> None:
        last = content["rows"][-1]
        say(f"{shape}: {last['prompt_tokens']} prompt tokens, K={last['num_kept_units']} done")
        if output is not None:
            report.write_document(output, content)

    content = runs.run_latency(
        runs.ModelOptions(shape, keep_units or (), predictor_config, bits, dtype, model),
        [Workload(tokens, new_tokens, samples) for tokens in prompt or (2048, 4096)],
        repeats=Repeats(repeats),
        decode_repeats=decode_repeats,
        on_part=on_part,
    )
    _show(content, report.latency_table(content["rows"]), output, as_json)


@app.command()
def slicing(
    shape: ShapeName = "smollm2-135m",
    keep_units: KeepUnits = None,
    bits: Bits = 16,
    dtype: DType = "bfloat16",
    repeats: NumRepeats = 9,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Ways to gather FFN units, against a plain device copy of the same bytes."""
    from ifp_mlx.benchmarking import report, runs
    from ifp_mlx.benchmarking.timing import Repeats

    options = runs.ModelOptions(shape, keep_units or (), bits=bits, dtype=dtype)
    content = runs.run_slicing(options, repeats=Repeats(repeats))
    _show(content, report.slicing_table(content["rows"]), output, as_json)


@app.command()
def switch(
    shape: ShapeName = "smollm2-135m",
    predictor_config: PredictorConfig = "smollm2-135m",
    keep_units: KeepUnits = None,
    tasks: Annotated[
        list[int] | None,
        typer.Option(
            "--tasks", metavar="N", help="Tasks at hand; may be repeated. [default: 1 2 5 10 20]"
        ),
    ] = None,
    prompt: Annotated[
        int, typer.Option("--prompt", min=1, metavar="TOKENS", help="Prompt after each switch.")
    ] = 64,
    bits: Bits = 16,
    dtype: DType = "bfloat16",
    repeats: NumRepeats = 9,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Change the task: resident, from cached indices, and never seen before."""
    from ifp_mlx.benchmarking import report, runs
    from ifp_mlx.benchmarking.timing import Repeats

    content = runs.run_switching(
        runs.ModelOptions(shape, keep_units or (), predictor_config, bits, dtype),
        task_counts=tasks or [1, 2, 5, 10, 20],
        prompt_tokens=prompt,
        repeats=Repeats(repeats),
    )
    _show(content, report.switch_table(content["rows"]), output, as_json)


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
