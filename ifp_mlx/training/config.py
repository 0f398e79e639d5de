"""What a training run does: one frozen dataclass a subject, read strictly from TOML or JSON."""

import dataclasses
import hashlib
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from ifp_mlx.errors import ConfigError

MaskMode = Literal["none", "static", "ifp"]
PredictorMode = Literal["fixed", "joint"]
Relaxation = Literal["soft_top_k", "hard_concrete"]

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes examples.

    Attributes:
        instructions: prompt/response or ``messages`` files; a file's name is its domain.
            ``hub:OWNER/NAME[:SPLIT]`` reads a data set of the hub (extra ``datasets``).
        documents: files of documents, or hub data sets with a ``text`` field.
        tokenised: a folder of examples made before, in place of the files.
        descriptions: JSON, domain -> task descriptions that may stand in for a prompt.
        excluded_sources: records whose ``source`` starts with one of these are left out.
        skip_bad_lines: skip and count lines that cannot be used instead of stopping.
        max_tokens: examples are cut here.
        chunk_tokens: length of a document's chunks.
        num_chunks: C, chunks a document window.
        document_stride: every n-th document of a file is used.
        held_out_share: of the examples, how many are not trained on and tell before from after.
    """

    instructions: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    tokenised: str | None = None
    descriptions: str | None = None
    excluded_sources: tuple[str, ...] = ()
    skip_bad_lines: bool = False
    max_tokens: int = 512
    chunk_tokens: int = 256
    num_chunks: int = 2
    document_stride: int = 1
    held_out_share: float = 0.1


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stretch of the run.

    Attributes:
        tokens: its length in training tokens, padding not counted.
        document_share: the share of its tokens that come from documents, 0 to 1.
    """

    tokens: int
    document_share: float = 0.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay.

    Attributes:
        learning_rate: the peak, for the language model.
        final_share: the learning rate at the end, as a share of the peak.
        warmup_steps: steps of linear warm-up.
        betas: AdamW's moments.
        weight_decay: decoupled, for the language model.
        max_grad_norm: gradients are scaled down to this norm.
    """

    learning_rate: float = 2e-4
    final_share: float = 0.1
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Regression of the predictor's head on the dense model's own importance.

    Attributes:
        examples: how many training examples are measured; 0 leaves the head at the prior.
        held_out: of them, how many only measure agreement.
        steps: regression steps, fewer where they would be more than 60 passes over the examples.
        batch_size: examples a step.
        learning_rate: the peak; cosine to zero.
        description_share: how often a task description stands in for the prompt.
    """

    examples: int = 8000
    held_out: int = 200
    steps: int = 1500
    batch_size: int = 256
    learning_rate: float = 1e-3
    description_share: float = 0.25


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """Training the predictor together with the model.

    The defaults are those of the shipped adapter.

    Attributes:
        start_share: share of the steps that the predictor stays fixed.
        learning_rate: for the predictor's head, or for the scores of a static mask.
        relaxation: whose gradient the mask has.
        eps_start: SoftTopK's temperature when joint training starts, in standard deviations.
        eps_end: the same at the end.
        anchor_weight: weight of the warm start's regression, kept as a loss.
        mean_weight: share of the mask gradient's mean over the batch that the predictor gets, 0
            to 1. What all inputs need alike is learned through it; at 0 only what sets them apart.
        l0_weight: weight of HardConcrete's loss on the expected number of open gates.
        max_overlap_rise: collapse alarm: how much the probe batch's overlap may rise.
        probe_every: steps between looks at the probe batch.
        rollbacks: how often the predictor is set back, and then fixed, before the run stops.
    """

    start_share: float = 0.0
    learning_rate: float = 4e-4
    relaxation: Relaxation = "soft_top_k"
    eps_start: float = 0.8
    eps_end: float = 0.3
    anchor_weight: float = 0.05
    mean_weight: float = 1.0
    l0_weight: float = 1.0
    max_overlap_rise: float = 0.15
    probe_every: int = 25
    rollbacks: int = 1


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Learning from a dense model's distribution.

    Attributes:
        weight: of the KL divergence beside the cross-entropy; 0 switches it off.
        teacher: an adapter of the base model, such as a run with mask ``none`` leaves; None is
            the base model as it is.
        temperature: of both distributions.
    """

    weight: float = 0.0
    teacher: str | None = None
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank instead of full fine-tuning.

    Attributes:
        rank: 0 trains every weight but the embeddings.
        scale: factor of the low-rank product.
    """

    rank: int = 0
    scale: float = 2.0


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """A whole run.

    Attributes:
        model: checkpoint folder.
        mask: which masks the FFN has: none (plain fine-tuning), one static mask, or one a sample.
        predictor: with ``ifp`` masks, fixed after its warm start, or joint; with a ``static``
            mask, whether its scores stay at the importance that was measured, or are trained.
        start: an adapter of the base model to go on from; None starts from the base itself.
        keep_units: K, or several: one is drawn each step, so that one run serves them all. None is
            the one that the model is used with.
        stages: in order; none is a few passes over the data.
        batch_tokens: tokens a step, padding counted; 0 is as the data and the stages allow.
        grad_accumulation_steps: micro-batches a step.
        compute_dtype: bfloat16 or float32; auto is float32 on a CPU, where 16 bits are slow, and
            bfloat16 elsewhere. Master weights are float32.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        seed: of everything random.
        evaluate_every: steps between evaluations; 0 evaluates at the end alone.
        checkpoint_every: steps between checkpoints; 0 writes none but the last.
    """

    model: str = ""
    mask: MaskMode = "ifp"
    predictor: PredictorMode = "joint"
    start: str | None = None
    keep_units: tuple[int, ...] = ()
    stages: tuple[StageConfig, ...] = ()
    batch_tokens: int = 0
    grad_accumulation_steps: int = 1
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    evaluate_every: int = 0
    checkpoint_every: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    joint: JointConfig = dataclasses.field(default_factory=JointConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        """Check what the types cannot say.

        Raises:
            ConfigError: a value out of range.
        """
        if any(keep < 1 for keep in self.keep_units):
            raise ConfigError("keep_units must be one positive number or several")
        if any(stage.tokens < 1 for stage in self.stages):
            raise ConfigError("each stage needs a positive number of tokens")
        if any(not 0 <= stage.document_share <= 1 for stage in self.stages):
            raise ConfigError("document_share must be between 0 and 1")
        if self.grad_accumulation_steps < 1 or 0 < self.batch_tokens < self.data.max_tokens:
            raise ConfigError("batch_tokens must hold at least one example of max_tokens")
        if not 0 < self.data.held_out_share < 1:
            raise ConfigError("data.held_out_share must be between 0 and 1")
        if self.start is not None and self.mask == "static":
            raise ConfigError("a static mask starts from the base model: leave out `start`")
        if not 0 <= self.joint.start_share <= 1:
            raise ConfigError("joint.start_share must be between 0 and 1")
        if not 0 <= self.joint.mean_weight <= 1:
            raise ConfigError("joint.mean_weight must be between 0 and 1")
        if self.distillation.teacher is not None and not self.distillation.weight:
            raise ConfigError("a teacher needs a weight: `distillation`")
        if self.optimizer.learning_rate <= 0 or self.joint.learning_rate < 0:
            raise ConfigError("learning rates must be positive")

    def digest(self) -> str:
        """Return a short hash of everything that shapes the run."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def load_config(path: Path) -> TrainingConfig:
    """Return the run described by a TOML or JSON file.

    Raises:
        ConfigError: the file cannot be read, or has unknown keys or values of a wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return config_from_dict(TrainingConfig, values)


def config_from_dict(kind: type[Config], values: Any, where: str = "") -> Config:
    """Return a configuration dataclass built from plain values, strictly.

    Raises:
        ConfigError: unknown keys or values of a wrong type; the message has the dotted key.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the configuration'} must be a table of keys and values")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(
            f"unknown key {where}{unknown[0]}; known here: {', '.join(sorted(hints))}"
        )
    return kind(
        **{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()}
    )


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    choices = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return config_from_dict(cast(type[Any], hint), value, f"{where}.")
    if origin is Literal:
        if value in choices:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(choices)}, not {value!r}")
    if origin is types.UnionType:
        return None if value is None else _convert(choices[0], value, where)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(choices[0], item, f"{where}[{n}]") for n, item in enumerate(items))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, not {value!r}")
    return value
