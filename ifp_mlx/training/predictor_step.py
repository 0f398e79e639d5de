"""Training the predictor's head beside the model, without letting its masks collapse.

The model's backward pass gives the gradient of the loss with respect to every sample's mask. The
head is then trained with that gradient alone: the forward mask was hard, the gradient goes
through a soft top-k. Three things keep the masks apart: of the gradient's mean over the batch,
which moves all masks alike, only a set share stays; the warm start's regression stays as an
anchor; and the overlap of a fixed probe batch is watched.
"""

import dataclasses

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifp_mlx.errors import TrainingError
from ifp_mlx.selection.predictor import PredictorHead
from ifp_mlx.selection.top_k import hard_concrete, hard_concrete_l0, soft_top_k, top_k_mask
from ifp_mlx.training.config import JointConfig, OptimizerConfig
from ifp_mlx.training.losses import mean_pairwise_overlap
from ifp_mlx.training.optimizer import AdamW, FlatLayout, learning_rate_at, trainable
from ifp_mlx.training.run_state import HeadState

_ANCHOR_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Anchor:
    """Examples of the warm start whose importance the head must not forget.

    Attributes:
        features: (M, 2 D) of their instructions.
        targets: (M, L, F), standardised.
    """

    features: npt.NDArray[np.float32]
    targets: npt.NDArray[np.float16]


class PredictorTrainer:
    """The head with its optimizer, the anchor and the collapse alarm."""

    def __init__(
        self,
        head: PredictorHead,
        anchor: Anchor | None,
        probe_features: npt.NDArray[np.float32] | None,
        probe_keep_units: int,
        config: JointConfig,
        seed: int,
    ):
        self.head = head
        self.config = config
        self.layout = FlatLayout.of(trainable(head))
        self.state = AdamW.start(self.layout.gather(head))
        self.frozen = False
        self.rollbacks = 0
        self._anchor = anchor
        # One static mask has nothing to collapse into: there is no probe to watch.
        self._probe = None if probe_features is None else mx.array(probe_features)
        self._probe_keep = probe_keep_units
        self._seed = seed
        self._start_weights = self.state.weights
        self.start_overlap = self.probe_overlap()
        self._gradient = mx.value_and_grad(self._loss)

    def masks(self, features: mx.array, keep_units: int, step: int) -> mx.array:
        """Return the (B, L, F) masks of the forward pass for a step."""
        scores = self.head(features)
        if self.config.relaxation == "hard_concrete" and not self.frozen:
            return hard_concrete(
                self._log_odds(scores, keep_units), self._noise(scores.shape, step)
            )
        return top_k_mask(scores, keep_units)

    def step(
        self,
        features: mx.array,
        mask_gradient: mx.array,
        keep_units: int,
        step: int,
        progress: float,
        num_ranks: int = 1,
    ) -> tuple[mx.array, mx.array]:
        """Return the head's flat gradient and the anchor loss for one batch. Lazy.

        Args:
            features: (B, 2 D) of the batch.
            mask_gradient: (B, L, F), as ``centred`` returns it.
            keep_units: K of the step.
            step: number of the step, for the noise.
            progress: share of joint training that is done, 0 to 1, for eps.
            num_ranks: machines whose gradients will be summed; each adds its part of the anchor.
        """
        rng = np.random.default_rng([self._seed, 4, step])
        anchor_features = anchor_targets = mx.zeros((0,))
        if self._anchor is not None:
            rows = rng.integers(0, len(self._anchor.features), size=_ANCHOR_BATCH)
            anchor_features = mx.array(self._anchor.features[rows])
            anchor_targets = mx.array(self._anchor.targets[rows])
        eps = self.config.eps_start * (self.config.eps_end / self.config.eps_start) ** progress
        (_, anchor_loss), grads = self._gradient(
            self.layout.split(self.state.weights),
            features,
            mask_gradient,
            keep_units,
            eps,
            step,
            anchor_features,
            anchor_targets,
            1.0 / num_ranks,
        )
        self.install()  # the gradient left its tracers in the head
        return self.layout.flatten(grads), anchor_loss

    def update(self, gradient: mx.array, learning_rate: float, optimizer: OptimizerConfig) -> None:
        """Move the head down a flat gradient. Lazy."""
        self.state.update(gradient, learning_rate, dataclasses.replace(optimizer, weight_decay=0.0))
        mx.async_eval(self.state.weights, self.state.first, self.state.second)
        self.install()

    def adopt(self, state: HeadState) -> None:
        """Go on from where a checkpoint was written."""
        self.state, self.frozen = state.state, state.frozen
        self.rollbacks, self.start_overlap = state.rollbacks, state.start_overlap
        self.install()

    def install(self) -> None:
        """Put the optimizer's weights into the head."""
        self.layout.install(self.head, self.layout.split(self.state.weights))

    def probe_overlap(self) -> float:
        """Return the probe batch's mean pairwise overlap over all layers. Evaluates."""
        if self._probe is None:
            return 1.0
        masks = top_k_mask(self.head(self._probe), self._probe_keep)
        return float(mean_pairwise_overlap(masks, self._probe_keep).mean())

    def check_collapse(self, step: int) -> float:
        """Return the probe's overlap; set the head back where it started if it rose too far.

        After a rollback the head stays fixed.

        Raises:
            TrainingError: the masks collapsed and no rollback is left.
        """
        overlap = self.probe_overlap()
        if overlap <= self.start_overlap + self.config.max_overlap_rise:
            return overlap
        if self.rollbacks >= self.config.rollbacks:
            raise TrainingError(
                f"the masks collapsed at step {step}: the probe batch's overlap rose from "
                f"{self.start_overlap:.3f} to {overlap:.3f}; lower joint.learning_rate"
            )
        self.rollbacks += 1
        self.frozen = True
        self.state = AdamW.start(self._start_weights)
        self.install()
        return overlap

    def learning_rate(self, step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
        """Return the head's learning rate: the model's schedule with its own peak."""
        return (
            learning_rate_at(step, num_steps, optimizer)
            * self.config.learning_rate
            / optimizer.learning_rate
        )

    def _log_odds(self, scores: mx.array, keep_units: int) -> mx.array:
        """Return HardConcrete's log-odds: 0 at the layer's K-th score, so K gates begin open."""
        threshold = mx.sort(scores, axis=-1)[..., -keep_units, None]
        return (scores - mx.stop_gradient(threshold)) / self.config.eps_start

    def _noise(self, shape: tuple[int, ...], step: int) -> mx.array:
        key = mx.random.key(self._seed * 1_000_003 + step)
        return mx.random.uniform(1e-4, 1.0 - 1e-4, shape=shape, key=key)

    def _loss(
        self,
        tensors: list[mx.array],
        features: mx.array,
        mask_gradient: mx.array,
        keep_units: int,
        eps: float,
        step: int,
        anchor_features: mx.array,
        anchor_targets: mx.array,
        share: float,
    ) -> tuple[mx.array, mx.array]:
        self.layout.install(self.head, tensors)
        scores = self.head(features)
        loss = mx.array(0.0)
        if self.config.relaxation == "hard_concrete":
            log_odds = self._log_odds(scores, keep_units)
            soft = hard_concrete(log_odds, self._noise(scores.shape, step))
            opened = hard_concrete_l0(log_odds).mean() - keep_units / scores.shape[-1]
            loss = loss + share * self.config.l0_weight * opened.square()
        else:
            soft = soft_top_k(scores, keep_units, eps)
        # The gradient of the model's loss, carried over to the scores.
        loss = loss + (mx.stop_gradient(mask_gradient) * soft).sum()
        anchor_loss = mx.array(0.0)
        if self._anchor is not None:
            anchor_loss = (self.head(anchor_features) - anchor_targets).square().mean()
        return loss + share * self.config.anchor_weight * anchor_loss, anchor_loss


def centred(mask_gradient: mx.array, group: mx.distributed.Group, mean_weight: float) -> mx.array:
    """Return a (B, L, F) mask gradient with its mean over the whole batch of all machines reduced.

    The mean moves every sample's mask alike: that drift is how masks can collapse, and how they
    learn what all samples need. ``mean_weight`` is the share of it that stays.
    """
    mask_gradient = mask_gradient.astype(mx.float32)
    if mean_weight == 1.0:
        return mask_gradient  # the mean is not needed, nor an exchange between machines for it
    total = mask_gradient.sum(axis=0)
    count = mx.array(float(mask_gradient.shape[0]))
    if group.size() > 1:
        total = mx.distributed.all_sum(total, group=group)
        count = mx.distributed.all_sum(count, group=group)
    return mask_gradient - (1.0 - mean_weight) * total / count
