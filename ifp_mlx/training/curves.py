"""A picture of a run: loss and learning rate over training tokens."""

import json
from pathlib import Path
from typing import Any

from ifp_mlx.errors import DataError, UsageError

_SMOOTHING = 0.9


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run's JSON-lines log.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no training log: {error}") from error


def draw_curves(logs: dict[str, Path], target: Path) -> None:
    """Draw the loss of one or several runs, smoothed, to a PNG.

    Raises:
        DataError: a log cannot be read.
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("curves need matplotlib: install ifp-mlx[plots]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, path in logs.items():
        records = [record for record in read_log(path) if "loss" in record]
        tokens = [record["tokens"] / 1e6 for record in records]
        axes.plot(tokens, _smoothed([record["loss"] for record in records]), label=name)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats a token, smoothed)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _smoothed(values: list[float]) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    result: list[float] = []
    average = weight = 0.0
    for value in values:
        average = _SMOOTHING * average + (1.0 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1.0 - _SMOOTHING)
        result.append(average / weight)
    return result
