"""The order of a run, fixed before it starts: which examples, padded how, with which K.

It depends on the data, the stages and the seed alone: runs that differ in their masks see the
same batches in the same order.
"""

import dataclasses
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifp_mlx.errors import TrainingError
from ifp_mlx.text.examples import ExampleSet
from ifp_mlx.training.config import TrainingConfig

_POOL_BATCHES = 48
"""Examples are sorted by length within pools of this many batches, then the batches shuffled."""

_WIDTH_MULTIPLE = 64
"""Batches are padded to a multiple of this, so that few different shapes occur."""

_POSITION_MULTIPLE = 256
"""Loss positions are padded to a multiple of this, with weight 0."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        examples: (B,) indices into the example set.
        keep_units: K of this step's masks.
        num_tokens: without padding.
        stage: index of the stage.
    """

    examples: npt.NDArray[np.int64]
    keep_units: int
    num_tokens: int
    stage: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """What the model and the loss need.

    Attributes:
        token_ids: (B, T) int32, padded on the right.
        positions: (N,) int32, where in the flattened (B T) the loss looks.
        labels: (N,) int32, the token that follows there.
        weights: (N,) float32; over a whole step they sum to 1.
    """

    token_ids: mx.array
    positions: mx.array
    labels: mx.array
    weights: mx.array


def make_schedule(examples: ExampleSet, config: TrainingConfig) -> list[Step]:
    """Return all steps of a run.

    A domain's share of tokens is proportional to the square root of its size, among documents
    and among instructions: small domains are seen more often than their size says, large ones
    less. Within a domain every example comes once before any comes again.

    Raises:
        TrainingError: a stage asks for a kind of text that there is none of.
    """
    rng = np.random.default_rng([config.seed, 1])
    queues = [
        _endless(
            np.flatnonzero(examples.domains == domain),
            np.random.default_rng([config.seed, 2, domain]),
        )
        for domain in range(len(examples.domain_names))
    ]
    lengths = examples.lengths()
    steps: list[Step] = []
    for number, stage in enumerate(config.stages):
        chances = domain_chances(examples, stage.document_share)
        left = stage.tokens
        while left > 0:
            pool: list[int] = []
            room = min(left, _POOL_BATCHES * config.batch_tokens)
            while room > 0:
                domain = rng.choice(len(chances), p=chances)
                pool.append(next(queues[domain]))
                room -= int(lengths[pool[-1]])
            batches = list(_cut(np.array(pool), lengths, config.batch_tokens))
            for index in rng.permutation(len(batches)):
                batch = batches[index]
                keep = int(rng.choice(config.keep_units))
                count = int(lengths[batch].sum())
                steps.append(Step(batch, keep, count, number))
                left -= count
    return steps


def domain_chances(examples: ExampleSet, document_share: float) -> npt.NDArray[np.float64]:
    """Return how likely each domain is to give the next example.

    Raises:
        TrainingError: there is no text of a kind that is asked for.
    """
    names = examples.domain_names
    lengths = examples.lengths().astype(np.float64)
    counts = np.bincount(examples.domains, minlength=len(names))
    tokens = np.bincount(examples.domains, weights=lengths, minlength=len(names))
    is_document = np.array([name in examples.document_domains for name in names])
    shares = np.zeros(len(names))
    for kind, share in ((is_document, document_share), (~is_document, 1.0 - document_share)):
        if share == 0:
            continue
        if not tokens[kind].sum():
            raise TrainingError(
                "a stage needs a kind of text (documents or instructions) not given"
            )
        shares[kind] = share * np.sqrt(tokens[kind]) / np.sqrt(tokens[kind]).sum()
    chances = shares * counts / np.maximum(tokens, 1)
    normalised: npt.NDArray[np.float64] = chances / chances.sum()
    return normalised


def example_weights(
    examples: ExampleSet, indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the loss weight of one target token of each example; over all tokens they sum to 1.

    An example of n target tokens weighs sqrt(n) in all: between one vote a token, under which
    one-word answers vanish, and one vote an example, under which long answers do.
    """
    counts = np.array([max(1, int(examples.example(i)[1][1:].sum())) for i in indices])
    weights: npt.NDArray[np.float64] = 1.0 / np.sqrt(counts) / np.sqrt(counts).sum()
    return weights


def make_batch(
    examples: ExampleSet, indices: npt.NDArray[np.int64], weights: npt.NDArray[np.float64]
) -> Batch:
    """Return the padded batch of some examples; ``weights`` is one target token's, per example."""
    lengths = examples.lengths()[indices]
    width = -(-int(lengths.max()) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    ids = np.zeros((len(indices), width), dtype=np.int32)
    token_weights = np.zeros((len(indices), width), dtype=np.float32)
    for row, index in enumerate(indices):
        tokens, target = examples.example(int(index))
        ids[row, : len(tokens)] = tokens
        # Position t predicts token t + 1.
        token_weights[row, : len(tokens) - 1] = target[1:] * weights[row]
    flat = token_weights.reshape(-1)
    positions = np.flatnonzero(flat)
    padding = -len(positions) % _POSITION_MULTIPLE
    positions = np.concatenate([positions, np.zeros(padding, dtype=positions.dtype)])
    position_weights = flat[positions]
    if padding:
        position_weights[-padding:] = 0.0
    labels = np.roll(ids, -1, axis=1).reshape(-1)[positions]
    return Batch(
        token_ids=mx.array(ids),
        positions=mx.array(positions.astype(np.int32)),
        labels=mx.array(labels.astype(np.int32)),
        weights=mx.array(position_weights.astype(np.float32)),
    )


def _endless(items: npt.NDArray[np.int64], rng: np.random.Generator) -> Iterator[int]:
    while True:
        for item in rng.permutation(items):
            yield int(item)


def _cut(
    pool: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], batch_tokens: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield batches of similar length whose padded size is at most ``batch_tokens``."""
    pool = pool[np.argsort(lengths[pool], kind="stable")[::-1]]
    start = 0
    while start < len(pool):
        width = -(-int(lengths[pool[start]]) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        rows = max(1, batch_tokens // width)
        yield pool[start : start + rows]
        start += rows
