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
    from ifp_mlx.training.run import Evaluation

_HELD_OUT_EXAMPLES = 20
_PREPARATION_LINE_S = 5.0
_PHASES = {
    "importance": "measuring which units each example uses",
    "features": "reading instructions",
    "warm start": "teaching the predictor, step",
}


def train(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where the run and its adapter go."),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE.toml",
            help="The run; the flags below override what it says.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME_OR_FOLDER", help="The base model.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="FILE.jsonl",
            help="Prompts with responses, or messages; may be compressed (.xz), may be repeated. "
            "A file's name is its domain. hub:OWNER/NAME[:SPLIT] reads a data set of the hub.",
        ),
    ] = None,
    documents: Annotated[
        list[Path] | None,
        typer.Option("--documents", metavar="FILE.jsonl", help="Plain documents (field text)."),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option("--mask", metavar="ifp|static|none", help="What the FFN units go through."),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(
            "--predictor",
            metavar="fixed|joint",
            help="Keep the predictor as its warm start left it, or train it along.",
        ),
    ] = None,
    keep_units: Annotated[
        list[int] | None,
        typer.Option(
            "--keep-units", metavar="K", help="Units kept a layer; repeated: one is drawn a step."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", min=1, help="Train on N tokens, in one stage."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", metavar="RATE", help="The peak.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", metavar="N", min=1, help="Tokens a step.")
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option("--lora-rank", metavar="R", min=0, help="Low-rank training; 0 trains all."),
    ] = None,
    distillation: Annotated[
        float | None,
        typer.Option(
            "--distillation",
            metavar="W",
            min=0.0,
            help="Weight of learning from the dense model's distribution, beside the text itself.",
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            "--teacher",
            metavar="ADAPTER",
            help="Distil from the dense model with this adapter, as --mask none makes one.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of everything.")] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out",
            metavar="FOLDER",
            help="Evaluate on the .jsonl files of this folder, lm_*.jsonl being documents.",
        ),
    ] = None,
    bits: Annotated[
        int, typer.Option("--bits", metavar="2|3|4", help="Bits of a weight's change.")
    ] = 2,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out lines that cannot be used.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a predictor and the model behind its masks; write an adapter.

    The base model stays as it is: the adapter holds what training changed.
    """
    import mlx.core as mx

    from ifp_mlx.training.config import StageConfig, TrainingConfig, config_from_dict, load_config
    from ifp_mlx.training.run import load_run_config, run_training

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
        "lora": {"rank": lora_rank},
        "distillation": {"weight": distillation, "teacher": str(teacher) if teacher else None},
    }
    values = dataclasses.asdict(settings) | changes
    for name, fields in nested.items():
        values[name] |= {key: value for key, value in fields.items() if value is not None}
    if tokens is not None:
        share = 1.0 if documents and not data else 0.2 if documents else 0.0
        values["stages"] = [dataclasses.asdict(StageConfig(tokens, share))]
    if not resume:
        values["model"] = str(_model_folder(values["model"]))
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
    )
    if mx.distributed.init().rank():
        return  # of several machines the first writes, and reports
    for reason, number in outcome.skipped_lines.items():
        say(f"left out {plural(number, 'line')}: {reason}")
    _draw(output, settings)
    if as_json:
        print_json({"adapter": str(outcome.adapter), "log": str(outcome.log), "loss": outcome.loss})
    else:
        say(f"adapter written to {outcome.adapter}; use it with --adapter {outcome.adapter}")


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
