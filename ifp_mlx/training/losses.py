"""Losses: cross-entropy where the targets are, and distillation from the dense model."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.training.config import DistillationConfig
from ifp_mlx.training.schedule import Batch
from ifp_mlx.units.modules import trunk

CHUNK_POSITIONS = 4096
"""Logits of so many positions exist at once, whatever the batch: the vocabulary is wide."""


def training_loss(
    model: nn.Module, batch: Batch, teacher: nn.Module | None, config: DistillationConfig
) -> mx.array:
    """Return the scalar cross-entropy at the batch's loss positions, plus what distils. Lazy.

    Logits are computed at those positions alone, some thousand at a time, and again in the
    backward pass: together they would be the largest array of a step by far.

    Args:
        model: whose weights the gradient is wanted of; its output matrix has none.
        batch: token ids, positions, labels and weights.
        teacher: the dense model to distil from, or None.
        config: of the distillation.
    """
    hidden = _target_states(model, batch)  # (N, D)
    parts = [hidden, batch.labels, batch.weights]
    if teacher is not None:
        parts.append(mx.stop_gradient(_target_states(teacher, batch)))

    def chunk_loss(
        hidden: mx.array, labels: mx.array, weights: mx.array, *taught: mx.array
    ) -> mx.array:
        logits = output_logits(model, hidden).astype(mx.float32)
        # Recomputing asks for every argument's gradient, and indices have none.
        loss = weighted_cross_entropy(logits, mx.stop_gradient(labels), weights)
        for states in taught:
            teacher_logits = output_logits(teacher, states)
            loss = loss + config.weight * distillation_loss(logits, teacher_logits, weights, config)
        return loss

    checkpointed = mx.checkpoint(chunk_loss)
    loss = mx.array(0.0)
    for start in range(0, hidden.shape[0], CHUNK_POSITIONS):
        loss = loss + checkpointed(*(part[start : start + CHUNK_POSITIONS] for part in parts))
    return loss


def _target_states(model: nn.Module, batch: Batch) -> mx.array:
    """Return the (N, D) normed hidden states at the batch's loss positions."""
    hidden = trunk(model)(batch.token_ids)  # (B, T, D)
    picked: mx.array = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    return picked


def output_logits(model: Any, hidden: mx.array) -> mx.array:
    """Map (..., D) normed hidden states to (..., V) logits as the model's own call does."""
    if model.args.tie_word_embeddings:
        logits = model.model.embed_tokens.as_linear(hidden)
    else:
        logits = model.lm_head(hidden)
    result: mx.array = logits
    return result


def weighted_cross_entropy(logits: mx.array, labels: mx.array, weights: mx.array) -> mx.array:
    """Return the scalar sum of (N,) weights times the cross-entropy of (N, V) float32 logits."""
    chosen = mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return (weights * (mx.logsumexp(logits, axis=-1) - chosen)).sum()


def distillation_loss(
    logits: mx.array, teacher_logits: mx.array, weights: mx.array, config: DistillationConfig
) -> mx.array:
    """Return the weighted KL divergence from the teacher's distribution to the student's.

    Args:
        logits: (N, V) of the student.
        teacher_logits: (N, V) of the teacher; no gradient flows into it.
        weights: (N,) float32.
        config: temperature.
    """
    student = _softened(logits, config.temperature)
    teacher = _softened(mx.stop_gradient(teacher_logits), config.temperature)
    # log(p / q) = (teacher - student) - (their normalisers' difference): few (N, V) arrays.
    likely = mx.softmax(teacher, axis=-1)
    normalisers = mx.logsumexp(teacher, axis=-1) - mx.logsumexp(student, axis=-1)
    divergence = (likely * (teacher - student)).sum(axis=-1) - normalisers
    return (weights * divergence).sum() * config.temperature**2


def _softened(logits: mx.array, temperature: float) -> mx.array:
    # The largest array of a step: no copy of it that changes nothing.
    logits = logits.astype(mx.float32)
    return logits if temperature == 1.0 else logits / temperature


def mean_pairwise_overlap(masks: mx.array, keep_units: int) -> mx.array:
    """Return the mean share of kept units that two samples' masks have in common, over all pairs.

    Args:
        masks: (B, L, F) in [0, 1], each layer summing to K; float32. B of at least 2.
        keep_units: K.

    Returns:
        (L,) float32.
    """
    count = masks.shape[0]
    together = masks.sum(axis=0).square().sum(axis=-1) - masks.square().sum(axis=(0, 2))
    return together / (count * (count - 1) * keep_units)
