"""A training run from files to an adapter: what ``ifp train`` does."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ifp_mlx.adapters.adapter import Adapter, load_adapter, save_adapter
from ifp_mlx.chat.chat_template import ChatTokenizer, chat_ids
from ifp_mlx.errors import ArchitectureError, ConfigError, DataError, TrainingError, UsageError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.files import write_bytes_atomically
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model
from ifp_mlx.text.examples import (
    ExampleRules,
    ExampleSet,
    tokenise_files,
)
from ifp_mlx.text.records import BadLines
from ifp_mlx.training.config import DataConfig, TrainingConfig
from ifp_mlx.training.defaults import divide, settled
from ifp_mlx.training.held_out import HeldOutFigures, compare, example_losses
from ifp_mlx.training.masked_model import training_dtype
from ifp_mlx.training.memory import fit_to_memory, predict_training
from ifp_mlx.training.schedule import make_schedule
from ifp_mlx.training.trainer import Report, Trainer
from ifp_mlx.training.warm_start import WarmStart, continued_warm_start, make_warm_start
from ifp_mlx.units.amounts import Amounts
from ifp_mlx.units.modules import clone_module, named_arrays, unit_shape

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
        held_out: before and after on examples that were not trained on; None on all but the first
            of several machines.
    """

    adapter: Path
    log: Path
    skipped_lines: dict[str, int]
    loss: float
    held_out: HeldOutFigures | None


def run_training(
    config: TrainingConfig,
    output: Path,
    *,
    resume: bool = False,
    bits: int = 2,
    report: Report = lambda record: None,
    evaluate: Evaluation | None = None,
    default_keep_ratio: float = 0.9,
    memory_bytes: int | None = None,
) -> Outcome:
    """Train and write an adapter. Evaluates.

    ``output`` gets config.json, the tokenised examples, the warm start, a checkpoint, the log
    and, at the end, adapter/. Some of the examples are held out, and tell before from after.

    Args:
        config: the run.
        output: a new folder, or with ``resume`` the folder of the run to go on with.
        resume: continue from the last checkpoint; the result is that of an uninterrupted run.
        bits: of a weight's change in the adapter.
        report: called with each record of the log, and with the progress of the preparation.
        evaluate: called with the trainer when an evaluation is due.
        default_keep_ratio: of the units, where neither the run nor an adapter to start from says K.
        memory_bytes: the most to use; steps are cut to what fits. None does not look.

    Raises:
        UsageError: the folder exists, or does not when resuming.
        ArchitectureError: the model is a mixture of experts.
        ConfigError: the run does not fit the model.
        AdapterError: the teacher is no adapter of the model.
        DataError: text that cannot be used, or too little of it.
        ResourceError: not even one example at a time fits in memory.
        TrainingError: the run had to stop.
    """
    is_writer = mx.distributed.init().rank() == 0
    if resume and not (output / "config.json").is_file():
        raise UsageError(f"{output} holds no run to resume")
    if not resume and is_writer and output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty; choose another folder or pass `resume`")
    folder = Path(config.model)
    _refuse_mixtures(folder)
    stored, _ = load_model(folder, lazy=True)
    tokenizer: ChatTokenizer = load_tokenizer(folder)
    bad = BadLines(skip=config.data.skip_bad_lines)
    examples, held_out = _examples(config.data, tokenizer, bad, output, resume=resume)
    begun = None if config.start is None else load_adapter(Path(config.start))
    config = settled(
        config, examples, _default_keep_units(folder, stored, begun, default_keep_ratio)
    )
    _check_fit(config, stored)
    if memory_bytes is not None:
        config = fit_to_memory(stored, config, int(examples.lengths().max()), memory_bytes)
    base, _ = load_model(folder, mx.float32)
    model = base if begun is None else begun.apply(base)
    teacher = _teacher(config, base)
    if is_writer:
        settings = json.dumps(dataclasses.asdict(config), indent=1)
        write_bytes_atomically(output / "config.json", settings.encode())
        examples.save(output / "examples")
        held_out.save(output / "held_out")
    report(_described(config, stored, examples, held_out))
    with _Log(output / LOG, report, append=resume, active=is_writer) as log:
        warm_start = _warm_start(config, base, begun, examples, tokenizer, output, log)
        if warm_start is not None and is_writer:
            warm_start.save(output / "warm_start")
        keep_units = max(config.keep_units)
        before = None
        if is_writer:
            head = None if warm_start is None else warm_start.head
            before = example_losses(model, held_out, head, base, keep_units)
        callback = None if evaluate is None else lambda trainer: evaluate(trainer, tokenizer)
        trainer = Trainer(
            model,
            examples,
            config,
            warm_start,
            teacher,
            base,
            report=log,
            evaluate=callback,
            checkpoint_folder=output / "checkpoint",
        )
        result = trainer.run(resume=resume)
        loss = log.last_loss
    adapter = output / "adapter"
    figures = None
    if is_writer:
        manifest = {
            "base_model": folder.name if begun is None else begun.base_model,
            "keep_units": sorted(config.keep_units),
            "training": {
                "digest": config.digest(),
                "steps": len(trainer.steps),
                "tokens": sum(step.num_tokens for step in trainer.steps),
                "start": None if begun is None else begun.fingerprint,
                "mask": config.mask,
                "predictor": config.predictor,
                "agreement": {} if warm_start is None else warm_start.agreement,
            },
        }
        weights = _changed_weights(model, begun) | result.weights
        save_adapter(adapter, base, weights, result.head, manifest, bits=bits, overwrite=True)
        del trainer, result, weights
        assert before is not None
        figures = compare(
            example_losses(base, held_out),
            before,
            _losses_of(load_adapter(adapter), base, held_out, keep_units),
        )
        content = json.dumps(dataclasses.asdict(figures), indent=1)
        write_bytes_atomically(output / "held_out.json", content.encode())
    return Outcome(adapter, output / LOG, dict(bad.counts), loss, figures)


def _default_keep_units(
    folder: Path, stored: nn.Module, begun: Adapter | None, ratio: float
) -> int:
    """Return the K that the model is used with: what an adapter was trained for, or a share."""
    if begun is not None:
        return max(begun.keep_units)
    amounts = Amounts.of(read_config(folder), unit_shape(stored).num_units)
    nearest = amounts.nearest(ratio)
    parts = (amount for amount in amounts.descending() if amount <= nearest)
    return next((amount for amount in parts if amount < amounts.num_units), nearest)


def _changed_weights(model: nn.Module, begun: Adapter | None) -> dict[str, mx.array]:
    """Return the weights that an adapter to start from changed."""
    if begun is None:
        return {}
    arrays = named_arrays(model)
    return {name: arrays[name] for name in begun.manifest["changed"]}


def _losses_of(
    adapter: Adapter, base: nn.Module, examples: ExampleSet, keep_units: int
) -> npt.NDArray[np.float64]:
    """Return the losses of a written adapter, as it will be used."""
    head = adapter.predictor(base).head if adapter.has_predictor else None
    return example_losses(adapter.apply(base), examples, head, base, keep_units)


def _described(
    config: TrainingConfig, stored: nn.Module, examples: ExampleSet, held_out: ExampleSet
) -> dict[str, Any]:
    """Return what the run is going to do, as a record of the log."""
    lengths = examples.lengths()
    return {
        "examples": len(examples),
        "held_out": len(held_out),
        "keep_units": list(config.keep_units),
        "tokens": sum(stage.tokens for stage in config.stages),
        "passes": sum(stage.tokens for stage in config.stages) / int(lengths.sum()),
        "batch_tokens": config.batch_tokens,
        "parts": config.grad_accumulation_steps,
        "memory_bytes": predict_training(stored, config, int(lengths.max())).total_bytes,
    }


def _refuse_mixtures(folder: Path) -> None:
    family = read_config(folder).family
    if family.kind.name != "ffn":
        raise ArchitectureError(
            f"{family.model_type} models cannot be trained here: masks are learnt over FFN units, "
            "not over experts; ifp fit finds how many experts a task needs"
        )


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
) -> tuple[ExampleSet, ExampleSet]:
    """Return the examples to train on, and those that are held out."""
    if resume:
        return ExampleSet.load(output / "examples"), ExampleSet.load(output / "held_out")
    if data.tokenised is not None:
        return divide(ExampleSet.load(Path(data.tokenised)), data.held_out_share)
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
    examples = tokenise_files(instructions, documents, tokenizer, rules, bad)
    return divide(examples, data.held_out_share)


def _warm_start(
    config: TrainingConfig,
    model: nn.Module,
    begun: Adapter | None,
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
    seen = np.concatenate([step.examples for step in steps])
    descriptions = _descriptions(config.data, tokenizer)
    if begun is not None:
        head = begun.predictor(model).head
        return continued_warm_start(reader, head, examples, seen, descriptions, report)
    return make_warm_start(
        reader,
        examples,
        seen,
        descriptions,
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
