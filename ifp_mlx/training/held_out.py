"""What training changed on text that it did not see."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ifp_mlx.selection.predictor import PredictorHead, instruction_window, reader_features
from ifp_mlx.selection.reading import pad_right
from ifp_mlx.selection.top_k import top_k_mask
from ifp_mlx.text.examples import ExampleSet
from ifp_mlx.training.config import DistillationConfig
from ifp_mlx.training.losses import training_loss
from ifp_mlx.training.schedule import make_batch
from ifp_mlx.units.masks import set_unit_masks, with_unit_masks


@dataclasses.dataclass(frozen=True)
class HeldOutFigures:
    """Cross-entropy of examples that were not trained on, in nats a target token.

    Attributes:
        num_examples: how many.
        whole: of the base model, all units.
        before: of what training started from, K units.
        after: of the adapter as it was written, K units.
        standard_error: of ``after - before``, over examples; 0 for a single one.
    """

    num_examples: int
    whole: float
    before: float
    after: float
    standard_error: float

    @property
    def is_worse(self) -> bool:
        """Whether what training started from answers these examples better."""
        return self.after >= self.before


def example_losses(
    model: nn.Module,
    examples: ExampleSet,
    head: PredictorHead | None = None,
    reader: nn.Module | None = None,
    keep_units: int = 0,
) -> npt.NDArray[np.float64]:
    """Return (nats, target tokens) of each example: (N, 2). Evaluates.

    Args:
        model: an mlx-lm model.
        examples: what is measured.
        head: scores the units for each example; None leaves all of them in use.
        reader: what the head's features come from.
        keep_units: K.
    """
    masked = model if head is None else with_unit_masks(model)
    rows = []
    for index in range(len(examples)):
        if head is not None and reader is not None:
            ids, lengths = pad_right([instruction_window(examples.source(index).tolist())])
            set_unit_masks(
                masked, top_k_mask(head(reader_features(reader, ids, lengths)), keep_units)
            )
        batch = make_batch(examples, np.array([index]), np.array([1.0]))
        nats = training_loss(masked, batch, None, DistillationConfig())
        rows.append([nats.item(), (batch.weights > 0).sum().item()])
        mx.clear_cache()
    return np.array(rows, dtype=np.float64)


def compare(
    whole: npt.NDArray[np.float64],
    before: npt.NDArray[np.float64],
    after: npt.NDArray[np.float64],
) -> HeldOutFigures:
    """Return the figures of three models' ``example_losses`` on the same examples."""
    difference = (after[:, 0] - before[:, 0]) / before[:, 1]
    count = len(difference)
    error = difference.std(ddof=1) / np.sqrt(count) if count > 1 else 0.0

    def mean(rows: npt.NDArray[np.float64]) -> float:
        return float(rows[:, 0].sum() / rows[:, 1].sum())

    return HeldOutFigures(count, mean(whole), mean(before), mean(after), float(error))
