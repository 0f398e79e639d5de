"""AdamW over one flat float32 vector of master weights.

A small model has hundreds of small tensors; as one vector the update is a handful of large
kernels, and so are the gradient norm, the exchange between machines and the checkpoint.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ifp_mlx.training.config import OptimizerConfig

_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class FlatLayout:
    """Where each named tensor lies in the vector.

    Attributes:
        names: parameter paths, in order.
        shapes: their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, parameters: dict[str, mx.array]) -> "FlatLayout":
        """Return the layout of named tensors, sorted by name."""
        names = tuple(sorted(parameters))
        return cls(names, tuple(tuple(parameters[name].shape) for name in names))

    def flatten(self, tensors: Sequence[mx.array]) -> mx.array:
        """Return tensors in the layout's order as one float32 vector."""
        return mx.concatenate([tensor.reshape(-1).astype(mx.float32) for tensor in tensors])

    def gather(self, module: nn.Module) -> mx.array:
        """Return a module's tensors of these names as one float32 vector."""
        parameters = dict(tree_flatten(module.parameters()))
        return self.flatten([parameters[name] for name in self.names])

    def split(self, vector: mx.array) -> list[mx.array]:
        """Return the tensors of a vector, in the layout's order and the vector's dtype."""
        ends: list[int] = []
        for shape in self.shapes:
            ends.append((ends[-1] if ends else 0) + math.prod(shape))
        parts = mx.split(vector, ends[:-1]) if len(ends) > 1 else [vector]
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def named(self, vector: mx.array) -> dict[str, mx.array]:
        """Return name -> tensor."""
        return dict(zip(self.names, self.split(vector), strict=True))

    def install(self, module: nn.Module, tensors: Sequence[mx.array]) -> None:
        """Put tensors in the layout's order into a module."""
        module.update(tree_unflatten(list(zip(self.names, tensors, strict=True))))


def trainable(module: nn.Module) -> dict[str, mx.array]:
    """Return name -> tensor of a module's trainable parameters."""
    return dict(tree_flatten(module.trainable_parameters()))


@dataclasses.dataclass
class AdamW:
    """Master weights with their moments, as flat float32 vectors.

    Attributes:
        weights: the master weights.
        first: running mean of the gradient.
        second: running mean of its square.
        updates: how many updates were made; the bias correction needs it.
    """

    weights: mx.array
    first: mx.array
    second: mx.array
    updates: int = 0

    @classmethod
    def start(cls, weights: mx.array) -> "AdamW":
        """Return fresh moments for some weights."""
        return cls(weights, mx.zeros_like(weights), mx.zeros_like(weights))

    def update(self, gradient: mx.array, learning_rate: float, config: OptimizerConfig) -> mx.array:
        """Take one step down a flat gradient and return its norm before clipping. Lazy."""
        self.updates += 1
        first_decay, second_decay = config.betas
        scalars = mx.array(
            [
                learning_rate,
                1.0 / (1.0 - first_decay**self.updates),
                1.0 / (1.0 - second_decay**self.updates),
            ]
        )
        norm = mx.linalg.norm(gradient)
        scale = mx.minimum(config.max_grad_norm / (norm + 1e-6), 1.0)
        self.weights, self.first, self.second = _adamw(
            self.weights,
            self.first,
            self.second,
            gradient,
            scale,
            scalars,
            first_decay,
            second_decay,
            config.weight_decay,
        )
        return norm


@partial(mx.compile, shapeless=True)
def _adamw(
    weights: mx.array,
    first: mx.array,
    second: mx.array,
    gradient: mx.array,
    scale: mx.array,
    scalars: mx.array,
    first_decay: float,
    second_decay: float,
    weight_decay: float,
) -> tuple[mx.array, mx.array, mx.array]:
    gradient = gradient * scale
    first = first_decay * first + (1.0 - first_decay) * gradient
    second = second_decay * second + (1.0 - second_decay) * gradient.square()
    step = (first * scalars[1]) / (mx.sqrt(second * scalars[2]) + _EPSILON)
    weights = weights - scalars[0] * (step + weight_decay * weights)
    return weights, first, second


def learning_rate_at(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine to ``final_share``."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_share + (1.0 - config.final_share) * cosine)
