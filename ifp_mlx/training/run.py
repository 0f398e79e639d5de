"""A training run from files to an adapter: what ``ifp train`` does."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ifp_mlx.adapters.adapter import load_adapter, save_adapter
from ifp_mlx.errors import ConfigError, DataError, TrainingError, UsageError
from ifp_mlx.storage.files import write_bytes_atomically
from ifp_mlx.storage.tokenizer import ChatTokenizer, chat_ids, load_tokenizer
from ifp_mlx.storage.weights import load_model
from ifp_mlx.text.examples import (
    ExampleRules,
    ExampleSet,
    tokenise_files,
)
from ifp_mlx.text.records import BadLines
from ifp_mlx.training.config import DataConfig, TrainingConfig
from ifp_mlx.training.masked_model import training_dtype
from ifp_mlx.training.schedule import make_schedule
from ifp_mlx.training.trainer import Report, Trainer
from ifp_mlx.training.warm_start import WarmStart, make_warm_start
from ifp_mlx.units.modules import clone_module, unit_shape

LOG = "log.jsonl"

Evaluation = Callable[[Trainer, ChatTokenizer], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run leaves behind.

    Attributes:
        adapter: the adapter's folder.
        log: the JSON-lines log.
        skipped_lines: reason -> number of lines left out.
        loss: of the last step.
    """

    adapter: Path
    log: Path
    skipped_lines: dict[str, int]
    loss: float


def run_training(
    config: TrainingConfig,
    output: Path,
    *,
    resume: bool = False,
    bits: int = 2,
    report: Report = lambda record: None,
    evaluate: Evaluation | None = None,
) -> Outcome:
    """Train and write an adapter. Evaluates.

    ``output`` gets config.json, the tokenised examples, the warm start, a checkpoint, the log
    and, at the end, adapter/.

    Args:
        config: the run.
        output: a new folder, or with ``resume`` the folder of the run to go on with.
        resume: continue from the last checkpoint; the result is that of an uninterrupted run.
        bits: of a weight's change in the adapter.
        report: called with each record of the log, and with the progress of the preparation.
        evaluate: called with the trainer when an evaluation is due.

    Raises:
        UsageError: the folder exists, or does not when resuming.
        ConfigError: the run does not fit the model.
        AdapterError: the teacher is no adapter of the model.
        DataError: text that cannot be used.
        TrainingError: the run had to stop.
    """
    is_writer = mx.distributed.init().rank() == 0
    if resume and not (output / "config.json").is_file():
        raise UsageError(f"{output} holds no run to resume")
    if not resume and is_writer and output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty; choose another folder or pass `resume`")
    folder = Path(config.model)
    model, _ = load_model(folder, mx.float32)
    _check_fit(config, model)
    teacher = _teacher(config, model)
    tokenizer: ChatTokenizer = load_tokenizer(folder)
    bad = BadLines(skip=config.data.skip_bad_lines)
    examples = _examples(config.data, tokenizer, bad, output, resume=resume)
    if is_writer:
        settings = json.dumps(dataclasses.asdict(config), indent=1)
        write_bytes_atomically(output / "config.json", settings.encode())
        examples.save(output / "examples")
    with _Log(output / LOG, report, append=resume, active=is_writer) as log:
        warm_start = _warm_start(config, model, examples, tokenizer, output, log)
        if warm_start is not None and is_writer:
            warm_start.save(output / "warm_start")
        callback = None if evaluate is None else lambda trainer: evaluate(trainer, tokenizer)
        trainer = Trainer(
            model,
            examples,
            config,
            warm_start,
            teacher,
            report=log,
            evaluate=callback,
            checkpoint_folder=output / "checkpoint",
        )
        result = trainer.run(resume=resume)
        loss = log.last_loss
    adapter = output / "adapter"
    if is_writer:
        manifest = {
            "base_model": folder.name,
            "keep_units": sorted(config.keep_units),
            "training": {
                "digest": config.digest(),
                "steps": len(trainer.steps),
                "tokens": sum(step.num_tokens for step in trainer.steps),
                "mask": config.mask,
                "predictor": config.predictor,
                "agreement": {} if warm_start is None else warm_start.agreement,
            },
        }
        save_adapter(
            adapter, model, result.weights, result.head, manifest, bits=bits, overwrite=True
        )
    return Outcome(adapter, output / LOG, dict(bad.counts), loss)


def _check_fit(config: TrainingConfig, model: nn.Module) -> None:
    num_units = unit_shape(model).num_units
    if config.mask != "none" and max(config.keep_units) >= num_units:
        raise ConfigError(
            f"keep_units = {max(config.keep_units)} must be below the model's {num_units} units"
        )


def _teacher(config: TrainingConfig, model: nn.Module) -> nn.Module | None:
    folder = config.distillation.teacher
    return None if folder is None else load_adapter(Path(folder)).apply(model)


def _examples(
    data: DataConfig, tokenizer: ChatTokenizer, bad: BadLines, output: Path, *, resume: bool
) -> ExampleSet:
    if resume:
        return ExampleSet.load(output / "examples")
    if data.tokenised is not None:
        return ExampleSet.load(Path(data.tokenised))
    if not data.instructions and not data.documents:
        raise ConfigError("no training text: set data.instructions or data.documents")
    rules = ExampleRules(
        max_tokens=data.max_tokens,
        chunk_tokens=data.chunk_tokens,
        num_chunks=data.num_chunks,
        document_stride=data.document_stride,
        excluded_sources=data.excluded_sources,
    )
    instructions = [Path(path) for path in data.instructions]
    documents = [Path(path) for path in data.documents]
    return tokenise_files(instructions, documents, tokenizer, rules, bad)


def _warm_start(
    config: TrainingConfig,
    model: nn.Module,
    examples: ExampleSet,
    tokenizer: ChatTokenizer,
    output: Path,
    report: Report,
) -> WarmStart | None:
    """Return what an earlier part of the run made, or make it; None for plain fine-tuning."""
    if config.mask == "none":
        return None
    saved = output / "warm_start"
    if saved.is_dir():
        return WarmStart.load(saved)
    steps = make_schedule(examples, config)
    reader = clone_module(model)
    reader.set_dtype(training_dtype(config))
    return make_warm_start(
        reader,
        examples,
        np.concatenate([step.examples for step in steps]),
        _descriptions(config.data, tokenizer),
        config.keep_units,
        config.warm_start,
        config.seed,
        report,
    )


def _descriptions(data: DataConfig, tokenizer: ChatTokenizer) -> dict[str, list[list[int]]]:
    if data.descriptions is None:
        return {}
    path = Path(data.descriptions)
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(domain): [
                chat_ids(tokenizer, [{"role": "user", "content": str(text)}]) for text in sentences
            ]
            for domain, sentences in texts.items()
        }
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no file of task descriptions: {error}") from error


class _Log:
    """Writes records to the log as they come, and passes them on."""

    def __init__(self, path: Path, report: Report, *, append: bool, active: bool):
        self.last_loss = float("nan")
        self._report = report
        self._file = path.open("a" if append else "w", encoding="utf-8") if active else None

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def __call__(self, record: dict[str, Any]) -> None:
        self.last_loss = record.get("loss", self.last_loss)
        if self._file is None:
            return
        if "loss" in record or "evaluation" in record:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self._report(record)


def load_run_config(output: Path) -> TrainingConfig:
    """Return the configuration that a run's folder was started with.

    Raises:
        TrainingError: the folder holds no run.
    """
    from ifp_mlx.training.config import load_config

    if not (output / "config.json").is_file():
        raise TrainingError(f"{output} holds no run: config.json is missing")
    return load_config(output / "config.json")
