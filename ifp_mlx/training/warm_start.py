"""Stage 0: the predictor's head learns what the dense model itself would keep.

One dense pass over prompt and response gives the importance of every unit for an example. The
head then learns, from the instruction alone, to score units like that. Because the reader is the
frozen base model, its features are computed once and kept for the whole run.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_map

from ifp_mlx.errors import DataError, TrainingError
from ifp_mlx.selection.ffn_statistics import down_column_norms
from ifp_mlx.selection.predictor import (
    PredictorHead,
    instruction_window,
    reader_features,
)
from ifp_mlx.selection.reading import pad_right
from ifp_mlx.selection.top_k import standardised, top_k_mask
from ifp_mlx.storage.files import staged_directory
from ifp_mlx.text.examples import ExampleSet
from ifp_mlx.training.config import OptimizerConfig, WarmStartConfig
from ifp_mlx.training.optimizer import AdamW, FlatLayout, learning_rate_at, trainable
from ifp_mlx.units.masks import with_observed_units
from ifp_mlx.units.modules import clone_module, trunk

Progress = Callable[[dict[str, Any]], None]

_COLLECT_TOKENS = 16384

_MOST_PASSES = 60
"""Regression sees no example more often than this: a small data set would be learned by heart."""


@dataclasses.dataclass
class WarmStart:
    """What the predictor knows before the model is trained.

    Attributes:
        prior: (L, F) float32, the mean of the targets: the static mask's scores.
        head: the predictor's head; at the prior when there were no regression steps.
        features: (N, 2 D) float32 of the instructions of ``example_ids``.
        example_ids: (N,) ascending.
        description_features: domain -> (n, 2 D) float32 of its task descriptions.
        targets: (M, L, F) float16, standardised log importance of ``target_ids``.
        target_ids: (M,) examples.
        agreement: K -> share of the held-out examples' top K units that head and prior find.
    """

    prior: mx.array
    head: PredictorHead
    features: npt.NDArray[np.float32]
    example_ids: npt.NDArray[np.int64]
    description_features: dict[str, npt.NDArray[np.float32]]
    targets: npt.NDArray[np.float16]
    target_ids: npt.NDArray[np.int64]
    agreement: dict[str, float]

    def features_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the (B, 2 D) features of some examples."""
        rows: npt.NDArray[np.float32] = self.features[np.searchsorted(self.example_ids, indices)]
        return rows

    def mixed_features(
        self,
        indices: npt.NDArray[np.int64],
        examples: ExampleSet,
        share: float,
        rng: np.random.Generator,
    ) -> npt.NDArray[np.float32]:
        """Return features in which a description stands in for a ``share`` of the instructions."""
        rows = np.array(self.features_of(indices))
        replaced = rng.random(len(indices)) < share
        picks = rng.random(len(indices))
        for row, index in enumerate(indices):
            name = examples.domain_names[examples.domains[index]]
            described = self.description_features.get(name)
            if replaced[row] and described is not None:
                rows[row] = described[int(picks[row] * len(described))]
        return rows

    def of_first_process(self, group: mx.distributed.Group) -> "WarmStart":
        """Return a warm start with the prior and the head of the group's first process. Evaluates.

        Each process makes its own, and on a GPU no two come out the same to the last bit.
        """
        share = 1.0 if group.rank() == 0 else 0.0

        def first(array: mx.array) -> mx.array:
            return mx.distributed.all_sum(array * share, group=group)

        head: PredictorHead = clone_module(self.head)
        head.update(tree_map(first, head.parameters()))
        prior = first(self.prior)
        mx.eval(prior, head.parameters())
        return dataclasses.replace(self, prior=prior, head=head)

    def save(self, folder: Path) -> None:
        """Write everything to a folder, whole or not at all."""
        with staged_directory(folder, overwrite=True) as staging:
            arrays = {"prior": self.prior}
            arrays |= {f"head.{name}": value for name, value in trainable(self.head).items()}
            for name, rows in self.description_features.items():
                arrays[f"description.{name}"] = mx.array(rows)
            mx.save_safetensors(str(staging / "head.safetensors"), arrays)
            for name in ("features", "example_ids", "targets", "target_ids"):
                np.save(staging / f"{name}.npy", getattr(self, name))
            (staging / "agreement.json").write_text(json.dumps(self.agreement))

    @classmethod
    def load(cls, folder: Path) -> "WarmStart":
        """Return what ``save`` wrote; the large arrays are memory-mapped.

        Raises:
            DataError: the folder is missing or damaged.
        """
        try:
            arrays = mx.load(str(folder / "head.safetensors"))
            assert isinstance(arrays, dict)
            head = PredictorHead(
                arrays["head.project.weight"].shape[1],
                arrays["head.prior"],
                arrays["head.project.weight"].shape[0],
            )
            head.load_weights(
                [(name[5:], value) for name, value in arrays.items() if name.startswith("head.")]
            )
            return cls(
                prior=arrays["prior"],
                head=head,
                features=np.load(folder / "features.npy", mmap_mode="r"),
                example_ids=np.load(folder / "example_ids.npy"),
                description_features={
                    name[12:]: np.array(value)
                    for name, value in arrays.items()
                    if name.startswith("description.")
                },
                targets=np.load(folder / "targets.npy", mmap_mode="r"),
                target_ids=np.load(folder / "target_ids.npy"),
                agreement=json.loads((folder / "agreement.json").read_text()),
            )
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise DataError(f"{folder} is no folder of a warm start: {error}") from error


def make_warm_start(
    model: nn.Module,
    examples: ExampleSet,
    example_ids: npt.NDArray[np.int64],
    descriptions: dict[str, list[list[int]]],
    keep_units: Sequence[int],
    config: WarmStartConfig,
    seed: int,
    progress: Progress,
) -> WarmStart:
    """Measure importance and features with the dense model, then fit the head. Evaluates.

    Args:
        model: the dense model, also the reader, in the dtype to compute in.
        examples: all of them.
        example_ids: those that the run will see; features are kept for these.
        descriptions: domain -> token ids of task descriptions.
        keep_units: the K at which agreement is measured.
        config: amounts and rates.
        seed: of the order of regression.
        progress: called with figures now and then.

    Raises:
        TrainingError: the regression's loss is not a number, or there are too few examples.
    """
    example_ids = np.unique(example_ids)
    wanted = min(max(config.examples, 1), len(example_ids))
    # Chosen at random, because neighbouring examples come from one file.
    rng = np.random.default_rng([seed, 3])
    target_ids = rng.permutation(example_ids)[:wanted]
    importance = collect_importance(
        model, [examples.example(int(i))[0] for i in target_ids], progress
    )
    features = collect_features(model, [examples.source(int(i)) for i in example_ids], progress)
    described = {
        name: collect_features(model, ids, progress) for name, ids in sorted(descriptions.items())
    }
    prior = mx.array(importance.astype(np.float32).mean(axis=0))
    result = WarmStart(
        prior=prior,
        head=PredictorHead(features.shape[1], prior, seed=seed),
        features=features,
        example_ids=example_ids,
        description_features=described,
        targets=importance,
        target_ids=target_ids,
        agreement={},
    )
    if config.examples and config.steps:
        _fit(result, examples, keep_units, config, rng, progress)
    return result


def continued_warm_start(
    model: nn.Module,
    head: PredictorHead,
    examples: ExampleSet,
    example_ids: npt.NDArray[np.int64],
    descriptions: dict[str, list[list[int]]],
    progress: Progress,
) -> WarmStart:
    """Return the start of a run that goes on from a trained predictor. Evaluates.

    There is no importance to hold on to: what the head knows came after that.

    Args:
        model: the dense base model, which the head's features come from.
        head: of the adapter.
        examples: all of them.
        example_ids: those that the run will see.
        descriptions: domain -> token ids of task descriptions.
        progress: called with figures now and then.
    """
    example_ids = np.unique(example_ids)
    return WarmStart(
        prior=head.prior,
        head=head,
        features=collect_features(model, [examples.source(int(i)) for i in example_ids], progress),
        example_ids=example_ids,
        description_features={
            name: collect_features(model, ids, progress)
            for name, ids in sorted(descriptions.items())
        },
        targets=np.zeros((0, *head.prior.shape), dtype=np.float16),
        target_ids=np.zeros(0, dtype=np.int64),
        agreement={},
    )


def collect_features(
    reader: nn.Module, sources: Sequence[Any], progress: Progress
) -> npt.NDArray[np.float32]:
    """Return the (N, 2 D) features of instructions, in their order. Evaluates."""
    windows = [instruction_window(source) for source in sources]
    rows: npt.NDArray[np.float32] | None = None
    for done, batch in _batches([len(window) for window in windows]):
        ids, lengths = pad_right([windows[i] for i in batch])
        part = np.array(reader_features(reader, ids, lengths))
        if rows is None:
            rows = np.zeros((len(windows), part.shape[1]), dtype=np.float32)
        rows[batch] = part
        progress({"phase": "features", "done": done, "of": len(windows)})
    if rows is None:
        raise TrainingError("there is no instruction to read")
    return rows


def collect_importance(
    model: nn.Module, sequences: Sequence[Any], progress: Progress
) -> npt.NDArray[np.float16]:
    """Return each example's own importance of every unit: (N, L, F) float16. Evaluates.

    The log of ``||z_i|| * ||down_i||`` over the example's tokens, standardised per layer.
    """
    observed, rows = _observed(model)
    result: npt.NDArray[np.float16] | None = None
    for done, batch in _batches([len(sequence) for sequence in sequences]):
        ids, lengths = pad_right([sequences[i] for i in batch])
        inside = (mx.arange(ids.shape[1]) < lengths[:, None]).astype(mx.float32)
        rows.clear()
        rows.inside = inside[..., None]
        observed(ids)
        scores = np.array(standardised(mx.stack(rows, axis=1)).astype(mx.float16))  # (B, L, F)
        if result is None:
            result = np.zeros((len(sequences), *scores.shape[1:]), dtype=np.float16)
        result[batch] = scores
        progress({"phase": "importance", "done": done, "of": len(sequences)})
    if result is None:
        raise TrainingError("there is no example to measure importance on")
    return result


class _Rows(list[mx.array]):
    """Log importance of the layers passed so far, each (B, F)."""

    inside: mx.array


def _observed(model: nn.Module) -> tuple[Any, _Rows]:
    """Return a copy of the model's trunk that appends each layer's log importance to a list."""
    rows = _Rows()

    norms = down_column_norms(model)  # (L, F)

    def observe(layer: int, activations: mx.array) -> None:
        squares = activations.astype(mx.float32).square() * rows.inside
        rows.append(mx.log(mx.sqrt(squares.sum(axis=1)) * norms[layer] + 1e-9))  # over T

    return trunk(with_observed_units(model, observe)), rows


def _fit(
    start: WarmStart,
    examples: ExampleSet,
    keep_units: Sequence[int],
    config: WarmStartConfig,
    rng: np.random.Generator,
    progress: Progress,
) -> None:
    """Fit the head to the targets, and measure agreement on the held-out ones."""
    held_out = min(config.held_out, len(start.target_ids) // 4)
    num_fitted = len(start.target_ids) - held_out
    batch_size = min(config.batch_size, num_fitted)
    num_steps = min(config.steps, _MOST_PASSES * -(-num_fitted // batch_size))
    targets = mx.array(start.targets)
    head = start.head
    layout = FlatLayout.of(trainable(head))
    state = AdamW.start(layout.gather(head))
    optimizer = OptimizerConfig(
        learning_rate=config.learning_rate,
        final_share=0.0,
        warmup_steps=min(50, num_steps // 4),
        weight_decay=0.01,
    )

    def loss(tensors: list[mx.array], features: mx.array, rows: mx.array) -> mx.array:
        layout.install(head, tensors)
        return (head(features) - targets[rows].astype(mx.float32)).square().mean()

    step_function = mx.value_and_grad(loss)
    for step in range(num_steps):
        rows = rng.integers(0, num_fitted, size=batch_size)
        features = start.mixed_features(
            start.target_ids[rows], examples, config.description_share, rng
        )
        value, grads = step_function(
            layout.split(state.weights), mx.array(features), mx.array(rows)
        )
        state.update(layout.flatten(grads), learning_rate_at(step, num_steps, optimizer), optimizer)
        mx.eval(state.weights, state.first, state.second)
        if step % 50 == 0 or step == num_steps - 1:
            if not np.isfinite(value.item()):
                raise TrainingError(f"the warm start's loss is not a number at step {step}")
            progress({"phase": "warm start", "done": step, "of": num_steps, "loss": value.item()})
    layout.install(head, layout.split(state.weights))
    mx.eval(head.parameters())
    if held_out:
        held_features = mx.array(start.features_of(start.target_ids[num_fitted:]))
        truth = targets[num_fitted:].astype(mx.float32)
        for keep in keep_units:
            wanted = top_k_mask(truth, keep)
            for name, scores in (("head", head(held_features)), ("prior", start.prior[None])):
                found = (top_k_mask(scores, keep) * wanted).sum(axis=-1) / keep
                start.agreement[f"{name}@{keep}"] = float(found.mean())
        progress({"phase": "warm start", "agreement": start.agreement})


def _batches(lengths: Sequence[int]) -> Any:
    """Yield (examples done, indices) of batches of similar length."""
    order = np.argsort(np.array(lengths), kind="stable")[::-1]
    start = 0
    while start < len(order):
        rows = max(1, _COLLECT_TOKENS // lengths[order[start]])
        batch = order[start : start + rows]
        start += len(batch)
        yield start, batch
