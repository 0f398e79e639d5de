"""The training loop: one step function for dense, static and instruction-following masks."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ifp_mlx.errors import TrainingError
from ifp_mlx.selection.predictor import PredictorHead, reader_features
from ifp_mlx.text.examples import ExampleSet
from ifp_mlx.training.config import TrainingConfig
from ifp_mlx.training.losses import training_loss
from ifp_mlx.training.masked_model import MaskedModel
from ifp_mlx.training.optimizer import AdamW, learning_rate_at
from ifp_mlx.training.predictor_step import Anchor, PredictorTrainer, centred
from ifp_mlx.training.run_state import HeadState, RunState
from ifp_mlx.training.schedule import Batch, Step, example_weights, make_batch, make_schedule
from ifp_mlx.training.warm_start import WarmStart
from ifp_mlx.units.modules import clone_module

_PROBE_EXAMPLES = 64
_LOG_EVERY = 10

Report = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What a run ends with.

    Attributes:
        weights: name -> float32 tensor of everything that was trained in the language model.
        head: what scores the units: the predictor's head, for a static mask one that gives every
            instruction the same scores, or None for a run without masks.
    """

    weights: dict[str, mx.array]
    head: PredictorHead | None


class Trainer:
    """A run: build it, then ``run``.

    Args:
        model: the dense model to start from, float32; it is not changed.
        examples: the tokenised text.
        config: the run.
        warm_start: needed unless the masks are ``none``.
        teacher: the dense model to distil from; None is ``model`` itself.
        reader: the base model, which the predictor reads with; None is ``model`` itself.
        report: called with one JSON-able record for each line of the log.
        evaluate: called with the trainer now and then, and at the end; what it returns is logged.
        checkpoint_folder: where checkpoints go; None writes none.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: ExampleSet,
        config: TrainingConfig,
        warm_start: WarmStart | None = None,
        teacher: nn.Module | None = None,
        reader: nn.Module | None = None,
        report: Report = lambda record: None,
        evaluate: Callable[["Trainer"], dict[str, Any]] | None = None,
        checkpoint_folder: Path | None = None,
    ):
        if config.mask != "none" and warm_start is None:
            raise TrainingError(f"mask = {config.mask!r} needs a warm start")
        self.config = config
        self.examples = examples
        self.steps = make_schedule(examples, config)
        self.masked = MaskedModel(model, config)
        self.state = AdamW.start(self.masked.initial)
        self.step_number = 0
        self.predictor: PredictorTrainer | None = None
        self._base = reader or model
        self._reader: nn.Module | None = None
        self._warm_start = warm_start
        self._report = report
        self._evaluate = evaluate
        self._checkpoint_folder = checkpoint_folder
        self._group = mx.distributed.init()
        self._teacher = self._make_teacher(teacher or model) if config.distillation.weight else None
        # A bare name would be a constant of the gradient: both weights and masks are arguments.
        joint = config.mask != "none" and config.predictor == "joint"
        self._gradient = mx.value_and_grad(self._loss, argnums=(0, 1) if joint else 0)
        self._joint = joint
        self._pending: dict[str, Any] | None = None
        if config.mask != "none":
            assert warm_start is not None
            self.predictor = self._make_predictor(warm_start.of_first_process(self._group))

    def run(self, *, resume: bool = False) -> TrainedModel:
        """Train to the end, or from the last checkpoint on, and return the result. Evaluates.

        Raises:
            TrainingError: the loss is not a number or the masks collapsed, with the step.
        """
        if resume and self._checkpoint_folder is not None:
            self._adopt(RunState.load(self._checkpoint_folder, self.config.digest()))
        started = time.perf_counter()
        tokens_before = sum(step.num_tokens for step in self.steps[: self.step_number])
        all_tokens = sum(step.num_tokens for step in self.steps)
        tokens = tokens_before
        while self.step_number < len(self.steps):
            step = self.steps[self.step_number]
            number = self.step_number + 1
            pending = self.train_step(step)
            # The step before is read only now, when this one is under way on the device.
            self._finish_pending()
            tokens += step.num_tokens
            self.step_number = number
            elapsed = time.perf_counter() - started
            speed = (tokens - tokens_before) / elapsed
            pending |= {
                "of": len(self.steps),
                "tokens": tokens,
                "tokens_per_s": round(speed, 1),
                "elapsed_s": round(elapsed, 2),
                "left_s": round((all_tokens - tokens) / speed, 1),
                "stage": step.stage,
                "keep_units": step.keep_units,
            }
            self._pending = pending
            last = number == len(self.steps)
            evaluates = self._is_due(self.config.evaluate_every) or last
            checkpoints = self._is_due(self.config.checkpoint_every) or last
            if evaluates or checkpoints:
                self._finish_pending()
            if evaluates and self._evaluate is not None:
                self._report({"step": number, "evaluation": self._evaluate(self)})
            if checkpoints:
                self.checkpoint()
        return self.result()

    def train_step(self, step: Step) -> dict[str, Any]:
        """Start one optimizer step and return its figures, some of them not yet evaluated."""
        config = self.config
        weights = example_weights(self.examples, step.examples)
        rank, size = self._group.rank(), self._group.size()
        tensors = self.masked.cast(self.state.weights)
        features = self._features(step)
        gradient: mx.array | None = None
        head_gradient: mx.array | None = None
        loss = mx.array(0.0)
        record: dict[str, Any] = {"step": self.step_number + 1}
        parts = config.grad_accumulation_steps
        for part in range(parts):
            # Every machine and every micro-batch takes each n-th row; weights sum to 1 over all.
            rows = np.arange(rank * parts + part, len(step.examples), size * parts)
            if not len(rows):
                continue
            batch = make_batch(self.examples, step.examples[rows], weights[rows])
            # A static mask has one row of features, and one mask, for the whole batch.
            feature_rows = rows if config.mask == "ifp" else slice(None)
            part_features = None if features is None else mx.array(features[feature_rows])
            masks = self._masks(part_features, step)
            value, grads = self._gradient(tensors, masks, batch)
            tensor_grads, mask_grad = grads if self._joint else (grads, mx.zeros(()))
            flat = self.masked.layout.flatten(tensor_grads)
            gradient = flat if gradient is None else gradient + flat
            loss = loss + value
            if self._joint and self._predictor_moves():
                assert self.predictor is not None
                assert part_features is not None
                if config.mask == "ifp":
                    mask_grad = centred(mask_grad, self._group, config.joint.mean_weight)
                share, anchor = self.predictor.step(
                    part_features,
                    mask_grad,
                    step.keep_units,
                    self.step_number,
                    self._joint_progress(),
                    size * parts,
                )
                head_gradient = share if head_gradient is None else head_gradient + share
                record["anchor"] = anchor
            if parts > 1:  # or the passes of all parts would be in memory together
                mx.eval(gradient, loss, [] if head_gradient is None else head_gradient)
        if gradient is None:
            gradient = mx.zeros_like(self.state.weights)
        if size > 1:
            gradient = mx.distributed.all_sum(gradient, group=self._group)
            loss = mx.distributed.all_sum(loss, group=self._group)
        rate = learning_rate_at(self.step_number, len(self.steps), config.optimizer)
        norm = self.state.update(gradient, rate, config.optimizer)
        record |= {"loss": loss, "grad_norm": norm, "learning_rate": rate}
        if head_gradient is not None:
            record |= self._move_predictor(head_gradient)
        mx.async_eval(self.state.weights, self.state.first, self.state.second, loss, norm)
        return record

    def _finish_pending(self) -> None:
        """Read the figures of the step before, check them, and log some.

        Raises:
            TrainingError: the loss or the gradient is not a number.
        """
        record, self._pending = self._pending, None
        if record is None:
            return
        record = {
            name: value.item() if isinstance(value, mx.array) else value
            for name, value in record.items()
        }
        if not math.isfinite(record["loss"]) or not math.isfinite(record["grad_norm"]):
            raise TrainingError(
                f"the loss is not a number at step {record['step']} "
                f"(loss {record['loss']}, gradient norm {record['grad_norm']}); "
                "lower the learning rate or resume from the last checkpoint"
            )
        number = record["step"]
        probed = "probe_overlap" in record
        if number % _LOG_EVERY == 0 or number <= 3 or number == len(self.steps) or probed:
            self._report(record)

    def result(self) -> TrainedModel:
        """Return the weights as they are now."""
        return TrainedModel(
            weights=self.masked.plain_weights(self.state.weights),
            head=None if self.predictor is None else self.predictor.head,
        )

    def model_for_evaluation(self) -> nn.Module:
        """Return the model, with maskable units, in the compute dtype at the current weights."""
        return self.masked.set(self.masked.cast(self.state.weights), None)

    def reader_features(self, token_ids: mx.array, lengths: mx.array) -> mx.array:
        """Return the predictor's (B, 2 D) features of instructions outside the training text."""
        if self._reader is None:
            self._reader = clone_module(self._base)
            self._reader.set_dtype(self.masked.dtype)
        return reader_features(self._reader, token_ids, lengths)

    def checkpoint(self) -> None:
        """Write everything that a resumed run needs."""
        if self._checkpoint_folder is not None and self._group.rank() == 0:
            self._run_state().save(self._checkpoint_folder)

    def _run_state(self) -> RunState:
        """Return everything that changes in a run."""
        head = None
        if self.predictor is not None:
            predictor = self.predictor
            head = HeadState(
                predictor.state, predictor.frozen, predictor.rollbacks, predictor.start_overlap
            )
        return RunState(self.config.digest(), self.step_number, self.state, head)

    def _adopt(self, state: RunState) -> None:
        """Go on from where a checkpoint was written."""
        self.state, self.step_number = state.model, state.step_number
        if self.predictor is not None and state.head is not None:
            self.predictor.adopt(state.head)

    def _loss(self, tensors: list[mx.array], masks: mx.array | None, batch: Batch) -> mx.array:
        model = self.masked.set(tensors, masks)
        return training_loss(model, batch, self._teacher, self.config.distillation)

    def _masks(self, features: mx.array | None, step: Step) -> mx.array | None:
        if self.predictor is None:
            return None
        assert features is not None
        return mx.stop_gradient(self.predictor.masks(features, step.keep_units, self.step_number))

    def _features(self, step: Step) -> npt.NDArray[np.float32] | None:
        if self.config.mask == "none":
            return None
        assert self._warm_start is not None
        if self.config.mask == "static":
            return np.zeros((1, self._warm_start.features.shape[1]), dtype=np.float32)
        rng = np.random.default_rng([self.config.seed, 5, self.step_number])
        return self._warm_start.mixed_features(
            step.examples, self.examples, self.config.warm_start.description_share, rng
        )

    def _make_predictor(self, warm_start: WarmStart) -> PredictorTrainer:
        if self.config.mask == "static":
            return self._make_static_scores(warm_start)
        probe = np.concatenate([step.examples for step in self.steps])
        probe = np.random.default_rng([self.config.seed, 6]).permutation(np.unique(probe))
        anchor = None
        if self._joint and self.config.joint.anchor_weight and len(warm_start.target_ids):
            features = warm_start.features_of(warm_start.target_ids)
            anchor = Anchor(features, warm_start.targets)
        predictor = PredictorTrainer(
            warm_start.head,
            anchor,
            warm_start.features_of(probe[:_PROBE_EXAMPLES]),
            min(self.config.keep_units),
            self.config.joint,
            self.config.seed,
        )
        # Until it moves, the forward masks are the plain top K.
        predictor.frozen = not self._joint
        return predictor

    def _make_static_scores(self, warm_start: WarmStart) -> PredictorTrainer:
        """Return a head whose only weights are the scores that every instruction gets."""
        head = PredictorHead(warm_start.features.shape[1], warm_start.prior, seed=self.config.seed)
        head.freeze()
        head.unfreeze(keys="prior", recurse=False)
        trainer = PredictorTrainer(
            head, None, None, min(self.config.keep_units), self.config.joint, self.config.seed
        )
        trainer.frozen = not self._joint
        return trainer

    def _make_teacher(self, model: nn.Module) -> nn.Module:
        teacher: nn.Module = clone_module(model)
        teacher.set_dtype(self.masked.dtype)
        return teacher

    def _predictor_moves(self) -> bool:
        assert self.predictor is not None
        return not self.predictor.frozen and self.step_number >= self._joint_start()

    def _joint_start(self) -> int:
        return int(self.config.joint.start_share * len(self.steps))

    def _joint_progress(self) -> float:
        start = self._joint_start()
        return (self.step_number - start) / max(1, len(self.steps) - start)

    def _move_predictor(self, gradient: mx.array) -> dict[str, float]:
        assert self.predictor is not None
        if self._group.size() > 1:
            gradient = mx.distributed.all_sum(gradient, group=self._group)
        optimizer = self.config.optimizer
        rate = self.predictor.learning_rate(self.step_number, len(self.steps), optimizer)
        self.predictor.update(gradient, rate, optimizer)
        if self.step_number % self.config.joint.probe_every:
            return {}
        return {"probe_overlap": self.predictor.check_collapse(self.step_number + 1)}

    def _is_due(self, every: int) -> bool:
        return bool(every) and self.step_number % every == 0
