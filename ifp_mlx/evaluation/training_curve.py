"""Held-out quality of a model in training."""

from collections.abc import Mapping, Sequence

import mlx.core as mx

from ifp_mlx.evaluation.quality import HeldOutExample, evaluate, mean_cross_entropy
from ifp_mlx.selection.predictor import instruction_window
from ifp_mlx.selection.reading import pad_right
from ifp_mlx.selection.top_k import top_k_mask
from ifp_mlx.training.trainer import Trainer


def evaluate_trainer(
    trainer: Trainer, held_out: Mapping[str, Sequence[HeldOutExample]]
) -> dict[str, float]:
    """Return the mean cross-entropy over domains, for each K of the run. Evaluates.

    Args:
        trainer: at any step; its masks are the ones that inference would use.
        held_out: domain -> examples.

    Returns:
        ``instructions@K`` and ``documents@K``, where there are such domains.
    """
    examples = [example for name in sorted(held_out) for example in held_out[name]]
    model = trainer.model_for_evaluation()
    figures: dict[str, float] = {}
    for keep in sorted(trainer.config.keep_units):

        def masks(batch: Sequence[HeldOutExample], keep: int = keep) -> mx.array | None:
            return _masks(trainer, batch, keep)

        qualities = evaluate(model, examples, masks)
        for kind, documents in (("instructions", False), ("documents", True)):
            mean = mean_cross_entropy(qualities, documents=documents)
            if mean == mean:
                figures[f"{kind}@{keep}"] = mean
    return figures


def _masks(trainer: Trainer, batch: Sequence[HeldOutExample], keep: int) -> mx.array | None:
    if trainer.predictor is None:
        return None
    if trainer.config.mask == "static":
        return top_k_mask(trainer.predictor.head.prior, keep)
    windows = [instruction_window(example.prompt_ids) for example in batch]
    ids, lengths = pad_right(windows)
    features = trainer.reader_features(ids, lengths)
    return top_k_mask(trainer.predictor.head(features), keep)
