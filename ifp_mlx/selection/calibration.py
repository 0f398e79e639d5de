"""What a model's FFN units do on ordinary text: the prior of every selector."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import DataError, SelectionError
from ifp_mlx.storage.arrays import load_arrays, save_arrays
from ifp_mlx.units import ffn

FORMAT_VERSION = 1
_TASK_PREFIX = "task."


@dataclasses.dataclass(frozen=True)
class CalibrationExample:
    """One piece of text to measure on.

    Attributes:
        token_ids: prompt and response, or a document; one sequence.
        task: the name of the task it belongs to, if it has one.
    """

    token_ids: Sequence[int]
    task: str | None = None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Statistics of FFN units over a calibration set.

    Attributes:
        importance: (L, F) float32, ``||Z_i||_2 * ||down_proj[:, i]||_2`` a token (root mean
            square), the mean over tasks where tasks are named, so that none dominates by size.
        mean_activation: (L, F) float32, the mean of unit i's activation, for bias compensation.
        tasks: name -> (L, F) float32 importance on that task's text alone.
        num_tokens: how many tokens were seen.
    """

    importance: mx.array
    mean_activation: mx.array
    tasks: dict[str, mx.array]
    num_tokens: int

    def task_importance(self, task: str) -> mx.array:
        """Return the (L, F) importance of a named task.

        Raises:
            SelectionError: no such task was calibrated; the message lists those that were.
        """
        try:
            return self.tasks[task]
        except KeyError:
            known = ", ".join(sorted(self.tasks)) or "none"
            raise SelectionError(f"no calibrated task {task!r}; there are: {known}") from None

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all; half precision, which keeps the order."""
        arrays = {"mean_activation": self.mean_activation, "importance": self.importance}
        arrays |= {_TASK_PREFIX + name: values for name, values in self.tasks.items()}
        header = {"format_version": str(FORMAT_VERSION), "num_tokens": str(self.num_tokens)}
        halves = {name: values.astype(mx.float16) for name, values in arrays.items()}
        save_arrays(path, halves, header)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what ``save`` wrote.

        Raises:
            SelectionError: the file is missing, damaged or of another version.
        """
        try:
            arrays, metadata = load_arrays(path)
            if metadata.get("format_version") != str(FORMAT_VERSION):
                raise SelectionError(f"{path} has another format; run ifp calibrate again")
            floats = {name: values.astype(mx.float32) for name, values in arrays.items()}
            return cls(
                importance=floats["importance"],
                mean_activation=floats["mean_activation"],
                tasks={
                    name.removeprefix(_TASK_PREFIX): values
                    for name, values in floats.items()
                    if name.startswith(_TASK_PREFIX)
                },
                num_tokens=int(metadata["num_tokens"]),
            )
        except (ValueError, KeyError) as error:
            raise SelectionError(f"{path} is not a calibration file: {error}") from error


@dataclasses.dataclass
class _Sums:
    squares: mx.array  # (L, F)
    values: mx.array  # (L, F)
    num_tokens: int = 0


def calibrate(
    model: nn.Module,
    examples: Iterable[CalibrationExample],
    *,
    on_example: Callable[[int], Any] = lambda num_tokens: None,
) -> Calibration:
    """Measure every FFN unit on a stream of text, one forward pass an example. Evaluates.

    Args:
        model: the dense mlx-lm model.
        examples: read once, one at a time; memory does not grow with their number.
        on_example: called with the tokens of each example when it is done.

    Raises:
        DataError: there was no text.

    Source: Wanda (Sun et al. 2023) scores a weight by |W| * ||X||; summed over a unit's output
    column this is the norm product used here. FLAP (An et al. 2024) gives the mean activation.
    """
    shape = (len(ffn.ffn_modules(model)), ffn.num_units(model))
    collected: list[tuple[mx.array, mx.array]] = []

    def observe(activations: mx.array) -> None:
        units = activations.reshape(-1, activations.shape[-1]).astype(mx.float32)  # (B*T, F)
        collected.append(((units * units).sum(axis=0), units.sum(axis=0)))
        mx.async_eval(collected[-1])  # so that a layer's activations are not kept to the end

    observed = ffn.with_wrapped_down(model, lambda _, down: ffn.ObservedDown(down, observe))
    sums: dict[str | None, _Sums] = {}
    for example in examples:
        if not example.token_ids:
            continue
        collected.clear()
        observed.model(mx.array([list(example.token_ids)]), None)
        total = sums.setdefault(example.task, _Sums(mx.zeros(shape), mx.zeros(shape)))
        total.squares = total.squares + mx.stack([squares for squares, _ in collected])
        total.values = total.values + mx.stack([values for _, values in collected])
        total.num_tokens += len(example.token_ids)
        mx.eval(total.squares, total.values)
        on_example(len(example.token_ids))
    if not sums:
        raise DataError("no text to calibrate on: the data holds no example with text")
    return _summarise(model, sums)


def _summarise(model: nn.Module, sums: dict[str | None, _Sums]) -> Calibration:
    norms = down_column_norms(model)  # (L, F)
    importance = {
        task: mx.sqrt(total.squares / total.num_tokens) * norms for task, total in sums.items()
    }
    means = [total.values / total.num_tokens for total in sums.values()]
    calibration = Calibration(
        importance=mx.stack(list(importance.values())).mean(axis=0),
        mean_activation=mx.stack(means).mean(axis=0),
        tasks={task: values for task, values in importance.items() if task is not None},
        num_tokens=sum(total.num_tokens for total in sums.values()),
    )
    if not mx.isfinite(calibration.importance).all().item():
        raise DataError("the model's activations are not finite on this text; check its weights")
    return calibration


def down_column_norms(model: nn.Module) -> mx.array:
    """Return (L, F) float32: the L2 norm of each unit's column of the down projection."""
    down = ffn.ffn_layout(model.args.model_type).down
    return mx.stack(
        [
            mx.linalg.norm(ffn.dense_weight(module[down]).astype(mx.float32), axis=0)
            for module in ffn.ffn_modules(model)
        ]
    )
