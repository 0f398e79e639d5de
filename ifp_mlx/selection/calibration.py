"""What a model's units do on ordinary text: the prior of every selector."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import DataError, SelectionError
from ifp_mlx.selection.statistics import statistics_of
from ifp_mlx.storage.arrays import load_arrays, save_arrays

FORMAT_VERSION = "2"

_READABLE_VERSIONS = ("1", "2")  # of version 1 the mean activations are passed over
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
    """Statistics of a model's units over a calibration set.

    Attributes:
        importance: (L, F) float32, what counts for any text. Of FFN units ``||Z_i||_2 *
            ||down_proj[:, i]||_2`` a token (root mean square), the mean over tasks where tasks are
            named, so that none dominates by size; of experts the mean norm of their outputs.
        tasks: name -> (L, F) float32 importance on that task's text alone.
        num_tokens: how many tokens were seen.
    """

    importance: mx.array
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
        arrays = {"importance": self.importance}
        arrays |= {_TASK_PREFIX + name: values for name, values in self.tasks.items()}
        header = {"format_version": FORMAT_VERSION, "num_tokens": str(self.num_tokens)}
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
            if metadata.get("format_version") not in _READABLE_VERSIONS:
                raise SelectionError(f"{path} has another format; run ifp calibrate again")
            floats = {name: values.astype(mx.float32) for name, values in arrays.items()}
            return cls(
                importance=floats["importance"],
                tasks={
                    name.removeprefix(_TASK_PREFIX): values
                    for name, values in floats.items()
                    if name.startswith(_TASK_PREFIX)
                },
                num_tokens=int(metadata["num_tokens"]),
            )
        except (ValueError, KeyError) as error:
            raise SelectionError(f"{path} is not a calibration file: {error}") from error


def calibrate(
    model: nn.Module,
    examples: Iterable[CalibrationExample],
    *,
    on_example: Callable[[int], Any] = lambda num_tokens: None,
) -> Calibration:
    """Measure every unit on a stream of text, one forward pass an example. Evaluates.

    Args:
        model: the dense mlx-lm model.
        examples: read once, one at a time; memory does not grow with their number.
        on_example: called with the tokens of each example when it is done.

    Raises:
        DataError: there was no text.
    """
    statistics = statistics_of(model)
    of_tasks: dict[str | None, Any] = {}
    num_tokens = 0
    for example in examples:
        if not example.token_ids:
            continue
        if example.task not in of_tasks:
            of_tasks[example.task] = statistics(model)
        of_tasks[example.task].read([example.token_ids])
        num_tokens += len(example.token_ids)
        on_example(len(example.token_ids))
    if not of_tasks:
        raise DataError("no text to calibrate on: the data holds no example with text")
    calibration = Calibration(
        importance=statistics.prior(list(of_tasks.values())),
        tasks={task: of.importance() for task, of in of_tasks.items() if task is not None},
        num_tokens=num_tokens,
    )
    if not mx.isfinite(calibration.importance).all().item():
        raise DataError("the model's activations are not finite on this text; check its weights")
    return calibration
