"""How much memory a run will take, said before anything is loaded; steps are cut to what fits.

A step's examples can go through the model a few at a time, their gradients summed: that changes
nothing but memory and a little time. What does not fit then is refused.
"""

import dataclasses
import math
from collections.abc import Iterator

import mlx.nn as nn

from ifp_mlx.errors import ResourceError
from ifp_mlx.selection.predictor import DEFAULT_RANK
from ifp_mlx.training.config import TrainingConfig
from ifp_mlx.training.losses import CHUNK_POSITIONS
from ifp_mlx.training.masked_model import training_dtype
from ifp_mlx.units.masks import downs
from ifp_mlx.units.modules import dense_weight, input_dims, leaf_modules, unit_shape

PROCESS_BYTES = 500 * 10**6
"""Python, MLX, mlx-lm, the tokenizer and what the allocator keeps, before anything else."""

# What the backward pass needs of a token in one layer, in values: so many times the model's width
# and the FFN's. Measured by tests/training/test_training_memory.py, which holds them to it.
_HIDDEN_VALUES = 12
_FFN_VALUES = 13
_LOGIT_VALUES = 5  # of each target token, times the vocabulary
_MASTER_BYTES = 36  # weights, two moments, gradients and their successors, in float32


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Peak memory of a run, in bytes.

    Attributes:
        weights_bytes: the models that are in memory beside what is trained.
        state_bytes: what is trained, with its gradient and the optimizer's moments.
        step_bytes: what one pass of a step holds for its backward pass.
    """

    weights_bytes: int
    state_bytes: int
    step_bytes: int

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return self.weights_bytes + self.state_bytes + self.step_bytes + PROCESS_BYTES

    def describe(self) -> str:
        """Return the parts as one line for people."""
        return (
            f"weights {self.weights_bytes / 1e9:.2f} GB, what is trained "
            f"{self.state_bytes / 1e9:.2f} GB, a step {self.step_bytes / 1e9:.2f} GB, program "
            f"{PROCESS_BYTES / 1e9:.2f} GB"
        )


def predict_training(model: nn.Module, config: TrainingConfig, longest: int) -> TrainingMemory:
    """Return the peak memory of a run. Evaluates nothing.

    Args:
        model: the base model, loaded lazily, in whatever precision.
        config: of the run, settled.
        longest: tokens of the longest example.
    """
    parameters = _num_parameters(model)
    item_bytes = training_dtype(config).size
    copies = 4 + (item_bytes if item_bytes < 4 else 0)  # as read, and as computed
    if config.start is not None:
        copies += 4
    if config.distillation.weight and config.distillation.teacher is not None:
        copies += 4
    trained = _num_trained(model, config)
    hidden, vocabulary = _embedding_shape(model)
    first, num_layers = downs(model)[0], len(model.layers)
    tokens = max(config.batch_tokens // config.grad_accumulation_steps, longest)
    values = num_layers * (_HIDDEN_VALUES * hidden + _FFN_VALUES * input_dims(first))
    logits = _LOGIT_VALUES * min(tokens, CHUNK_POSITIONS) * vocabulary
    teachers = 2 if config.distillation.weight else 1
    return TrainingMemory(
        weights_bytes=parameters * copies,
        state_bytes=trained * _MASTER_BYTES,
        step_bytes=tokens * values * item_bytes + logits * 4 * teachers,
    )


def fit_to_memory(
    model: nn.Module, config: TrainingConfig, longest: int, available_bytes: int
) -> TrainingConfig:
    """Return a run that does the same with as much memory as there is.

    Args:
        model: the base model, loaded lazily.
        config: of the run, settled.
        longest: tokens of the longest example.
        available_bytes: the most that may be used.

    Raises:
        ResourceError: it does not fit one example at a time; with the numbers and what to change.
    """
    for fitted in _thriftier(config, longest):
        if predict_training(model, fitted, longest).total_bytes <= available_bytes:
            return fitted
    needed = predict_training(model, fitted, longest)
    advice = "shorter examples or a smaller model"
    if not config.lora.rank:
        advice = f"`lora_rank` 16 takes far less; else {advice}"
    raise ResourceError(
        f"training needs {needed.total_bytes / 1e9:.2f} GB even one example at a time "
        f"({needed.describe()}), there are {available_bytes / 1e9:.2f} GB: {advice}"
    )


def _thriftier(config: TrainingConfig, longest: int) -> Iterator[TrainingConfig]:
    """Yield a run, then the same in ever smaller pieces."""
    most = max(1, math.ceil(config.batch_tokens / longest))
    parts = config.grad_accumulation_steps
    while True:
        yield dataclasses.replace(config, grad_accumulation_steps=parts)
        if parts >= most:
            break
        parts = min(2 * parts, most)


def _num_parameters(model: nn.Module) -> int:
    from mlx_lm.utils import get_total_parameters

    return int(get_total_parameters(model))


def _num_trained(model: nn.Module, config: TrainingConfig) -> int:
    """Return how many numbers are trained: factors or weights, and the predictor's head."""
    hidden, vocabulary = _embedding_shape(model)
    trained = 0
    if config.mask != "none":
        shape = unit_shape(model)
        trained += DEFAULT_RANK * (2 * hidden + len(shape.layers) * shape.num_units)
    if not config.lora.rank:
        return trained + _num_parameters(model) - hidden * vocabulary
    for _, module in leaf_modules(model):
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            trained += config.lora.rank * (input_dims(module) + int(module.weight.shape[0]))
    return trained


def _embedding_shape(model: nn.Module) -> tuple[int, int]:
    """Return D and V."""
    embeddings = [
        module
        for _, module in leaf_modules(model)
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    ]
    vocabulary, hidden = dense_weight(embeddings[0]).shape
    return int(hidden), int(vocabulary)
