"""A picture of a run: loss and learning rate over training tokens."""

import json
from pathlib import Path
from typing import Any

from ifp_mlx.errors import DataError, UsageError
from ifp_mlx.storage.files import atomic_path

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
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("curves need matplotlib: pip install 'ifp-mlx[plots]'") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, path in logs.items():
        # Records of steps; the warm start's have a loss of their own, and no tokens.
        records = [record for record in read_log(path) if "tokens" in record]
        tokens = [record["tokens"] / 1e6 for record in records]
        axes.plot(tokens, _smoothed([record["loss"] for record in records]), label=name)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats a token, smoothed)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(target) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})


def _smoothed(values: list[float]) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    result: list[float] = []
    average = weight = 0.0
    for value in values:
        average = _SMOOTHING * average + (1.0 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1.0 - _SMOOTHING)
        result.append(average / weight)
    return result
