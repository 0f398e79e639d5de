"""``ifp train``: train an instruction-following adapter."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.terminal import plural, print_json, say, working
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    from ifp_mlx.training.config import TrainingConfig
    from ifp_mlx.training.held_out import HeldOutFigures
    from ifp_mlx.training.run import Evaluation

_HELD_OUT_EXAMPLES = 20
_LORA_RANK = 16
_PREPARATION_LINE_S = 5.0
_PHASES = {
    "importance": "measuring which units each example uses",
    "features": "reading instructions",
    "warm start": "teaching the predictor, step",
}


def train(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="The folder of the run; its adapter is in it.",
            show_default="runs/ and the name of the data",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE.toml",
            help="What the run is; the options below come before what it says.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The model to train, name or folder."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="FILE.jsonl",
            help="Text to train on: JSON lines of prompts with responses, or of messages, also "
            "compressed (.xz). May be given several times; the name of a file is its domain. "
            "hub:OWNER/NAME[:SPLIT] is a data set of the Hugging Face hub.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="ADAPTER|base",
            help="Go on from this adapter, or start from the model itself with base.",
            show_default="the adapter that chat uses",
        ),
    ] = None,
    documents: Annotated[
        list[Path] | None,
        typer.Option(
            "--documents",
            metavar="FILE.jsonl",
            help="Documents to train on: JSON lines with a field text.",
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            "--mask",
            metavar="ifp|static|none",
            help="Which units answer in training: those that the predictor picks for each text "
            "(ifp), the same ones for every text (static), or all (none).",
        ),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(
            "--predictor",
            metavar="fixed|joint",
            help="What picks the units. It is first fitted to what the model itself uses; then it "
            "stays so (fixed), or is trained along with the model (joint).",
        ),
    ] = None,
    keep_units: Annotated[
        list[int] | None,
        typer.Option(
            "--keep-units",
            metavar="K",
            help="Units to keep in each layer. Given several times, each step draws one of them.",
            show_default="as many as chat keeps",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="N",
            min=1,
            help="Train on so many tokens, in one stage.",
            show_default="three times the text, at most a million",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", metavar="RATE", help="The highest learning rate."),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--batch-tokens",
            metavar="N",
            min=1,
            help="Tokens of each step.",
            show_default="what makes 40 steps or more",
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            "--lora-rank",
            metavar="R",
            min=0,
            help="Train changes of this rank (LoRA); 0 trains all.",
            show_default="16; with --config as it says",
        ),
    ] = None,
    distillation: Annotated[
        float | None,
        typer.Option(
            "--distillation",
            metavar="W",
            min=0.0,
            help="How much is learnt from the whole model's probabilities, beside the text; 0 is "
            "from the text alone.",
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            "--teacher",
            metavar="ADAPTER",
            help="Learn from the whole model with this adapter, which --mask none made.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Seed of all that is drawn at random.")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out",
            metavar="FOLDER",
            help="Measure on the .jsonl files of this folder, which must not be trained on; those "
            "named lm_*.jsonl hold documents.",
        ),
    ] = None,
    bits: Annotated[
        int, typer.Option("--bits", metavar="2|3|4", help="Bits that the adapter has for a weight.")
    ] = 4,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Most memory to use, such as 6GB: a step goes through the model in as many parts "
            "as that needs.",
            show_default="what the machine has",
        ),
    ] = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out lines that cannot be used.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in the folder was stopped.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train what picks the units, and the model to answer with those alone; write an adapter.

    The base model stays as it is: the adapter holds what training changed. A tenth of the lines is
    not trained on; in the end they tell whether the adapter is better than what it started from.
    """
    import mlx.core as mx

    from ifp_mlx.assistant import DEFAULT_KEEP_RATIO
    from ifp_mlx.subnets.memory import usable_memory_bytes
    from ifp_mlx.training.config import StageConfig, TrainingConfig, config_from_dict, load_config
    from ifp_mlx.training.defaults import DOCUMENT_SHARE
    from ifp_mlx.training.run import load_run_config, run_training

    limit_bytes = None if memory is None else options.parse_bytes(memory)
    output = output or _default_output([*(data or []), *(documents or [])], config)
    if resume:
        if config is not None:
            raise UsageError(
                "--resume goes on with the run's own configuration; leave out --config"
            )
        settings = load_run_config(output)
    else:
        settings = load_config(config) if config is not None else TrainingConfig()
    changes: dict[str, Any] = {
        "model": model,
        "mask": mask,
        "predictor": predictor,
        "keep_units": keep_units or None,
        "batch_tokens": batch_tokens,
        "seed": seed,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    nested: dict[str, dict[str, Any]] = {
        "data": {
            "instructions": [str(path) for path in data] if data else None,
            "documents": [str(path) for path in documents] if documents else None,
            "skip_bad_lines": skip_bad_lines or None,
        },
        "optimizer": {"learning_rate": learning_rate},
        "lora": {"rank": lora_rank if config or resume or lora_rank is not None else _LORA_RANK},
        "distillation": {"weight": distillation, "teacher": str(teacher) if teacher else None},
    }
    values = dataclasses.asdict(settings) | changes
    for name, fields in nested.items():
        values[name] |= {key: value for key, value in fields.items() if value is not None}
    if tokens is not None:
        share = 1.0 if documents and not data else DOCUMENT_SHARE if documents else 0.0
        values["stages"] = [dataclasses.asdict(StageConfig(tokens, share))]
    if not resume:
        values["model"] = str(_model_folder(values["model"]))
        if start is not None or (config is None and values["mask"] == "ifp"):
            values["start"] = _start(start, Path(values["model"]))
    settings = config_from_dict(TrainingConfig, values)
    with working("starting"):
        evaluation = None if held_out is None else _held_out_evaluation(held_out)
    outcome = run_training(
        settings,
        output,
        resume=resume,
        bits=bits,
        report=_Progress(),
        evaluate=evaluation,
        default_keep_ratio=DEFAULT_KEEP_RATIO,
        memory_bytes=usable_memory_bytes(limit_bytes),
    )
    if mx.distributed.init().rank():
        return  # of several machines the first writes, and reports
    for reason, number in outcome.skipped_lines.items():
        say(f"left out {plural(number, 'line')}: {reason}")
    _draw(output, settings)
    figures = outcome.held_out
    if as_json:
        print_json(
            {
                "adapter": str(outcome.adapter),
                "log": str(outcome.log),
                "loss": outcome.loss,
                "held_out": None if figures is None else dataclasses.asdict(figures),
            }
        )
        return
    say(f"adapter written to {outcome.adapter}; use it with --adapter {outcome.adapter}")
    if figures is not None:
        typer.echo(_verdict(figures))


def _verdict(figures: HeldOutFigures) -> str:
    """Return before and after, and what follows from it."""
    lines = plural(figures.num_examples, "line")
    text = (
        f"on {lines} that were not trained on, nats a token: {figures.before:.3f} before, "
        f"{figures.after:.3f} after (whole model {figures.whole:.3f})"
    )
    if figures.is_worse:
        return f"{text}\nThe adapter made things worse: keep what you had. More text helps most."
    if figures.after + 2 * figures.standard_error >= figures.before:
        return f"{text}\nBetter, by less than so few lines can tell from chance."
    return text


def _default_output(sources: list[Path], config: Path | None) -> Path:
    """Return a folder named after the data, or after the configuration.

    Raises:
        UsageError: there is neither.
    """
    from ifp_mlx.text.examples import domain_of

    if sources:
        return Path("runs") / domain_of(sources[0])
    if config is not None:
        return Path("runs") / config.stem
    raise UsageError("give --data FILE.jsonl, text to train on")


def _start(named: str | None, model: Path) -> str | None:
    """Return the adapter to go on from: the one that is named, or the one that chat would use."""
    from ifp_mlx.adapters.adapter import load_adapter
    from ifp_mlx.adapters.shipped import find_companion
    from ifp_mlx.storage.config_file import read_config

    if named is not None:
        return None if named == "base" else named
    found = find_companion(model, read_config(model), "adapter")
    if found is None or not load_adapter(found, verify=False).has_predictor:
        return None
    return str(found)


def _model_folder(model: str) -> Path:
    from ifp_mlx.convert.registry import resolve_model

    return resolve_model(model or options.DEFAULT_MODEL)


class _Progress:
    """Says how far the run is, one line at a time; of the preparation a line every few seconds."""

    def __init__(self) -> None:
        self._said_at = time.monotonic()

    def __call__(self, record: dict[str, Any]) -> None:
        if "phase" not in record or "agreement" in record:
            _show(record)
        elif time.monotonic() - self._said_at > _PREPARATION_LINE_S:
            self._said_at = time.monotonic()
            say(f"{_PHASES[record['phase']]}: {record['done']} of {record['of']}")


def _show(record: dict[str, Any]) -> None:
    if "evaluation" in record:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in record["evaluation"].items())
        say(f"held out: {figures}")
    elif "loss" in record and "of" in record:
        say(
            f"step {record['step']}/{record['of']}  loss {record['loss']:.4f}  "
            f"{record['tokens_per_s']:.0f} tokens/s  {record['left_s']:.0f} s left"
        )
    elif "memory_bytes" in record:
        parts = f", {record['parts']} parts a step" if record["parts"] > 1 else ""
        say(
            f"{plural(record['examples'], 'example')}, {record['held_out']} held out; "
            f"{record['tokens']} tokens ({record['passes']:.1f} passes), "
            f"{record['batch_tokens']} a step{parts}; "
            f"K = {', '.join(map(str, record['keep_units']))}; "
            f"at most {record['memory_bytes'] / 1e9:.1f} GB"
        )
    elif "agreement" in record:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in record["agreement"].items())
        say(f"agreement with the dense model's own top units: {figures}")


def _draw(output: Path, settings: TrainingConfig) -> None:
    """Draw the run's curves where matplotlib is installed."""
    from ifp_mlx.training.curves import draw_curves
    from ifp_mlx.training.run import LOG

    try:
        draw_curves({settings.mask: output / LOG}, output / "curves.png")
    except UsageError as error:
        say(str(error))


def _held_out_evaluation(folder: Path) -> Evaluation:
    """Return a function that measures a trainer's model on held-out text."""
    from ifp_mlx.evaluation.quality import load_held_out
    from ifp_mlx.evaluation.training_curve import evaluate_trainer

    cache: dict[str, Any] = {}

    def evaluate(trainer: Any, tokenizer: Any) -> dict[str, Any]:
        if not cache:
            cache["examples"] = load_held_out(folder, tokenizer, _HELD_OUT_EXAMPLES)
        return evaluate_trainer(trainer, cache["examples"])

    return evaluate
