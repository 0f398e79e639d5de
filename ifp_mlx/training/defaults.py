"""What a run does where its configuration leaves it open: as much as its data are good for."""

import dataclasses

import numpy as np

from ifp_mlx.errors import DataError
from ifp_mlx.text.examples import ExampleSet
from ifp_mlx.training.config import StageConfig, TrainingConfig

PASSES = 3
"""Few examples are learned by heart when they are seen more often."""

MOST_TOKENS = 1_000_000
DOCUMENT_SHARE = 0.2
"""Of a stage's tokens, where there are instructions as well."""

LEAST_STEPS = 40
"""Fewer, larger steps learn less from the same text."""

_MOST_BATCH_TOKENS = 16384
_WARMUP_SHARE = 0.1
_MOST_HELD_OUT = 64


def settled(
    config: TrainingConfig, examples: ExampleSet, default_keep_units: int
) -> TrainingConfig:
    """Return a configuration that says everything.

    Args:
        config: of the run.
        examples: that it trains on.
        default_keep_units: K where the configuration says none.
    """
    lengths = examples.lengths()
    stages = config.stages or (
        StageConfig(min(MOST_TOKENS, PASSES * int(lengths.sum())), _document_share(examples)),
    )
    keep_units = config.keep_units or (default_keep_units,)
    config = dataclasses.replace(config, stages=stages, keep_units=keep_units)
    if config.batch_tokens:
        return config
    tokens = sum(stage.tokens for stage in stages)
    fitting = min(max(tokens // LEAST_STEPS, int(lengths.max())), _MOST_BATCH_TOKENS)
    batch_tokens = max(fitting, config.data.max_tokens)
    warmup = min(config.optimizer.warmup_steps, int(_WARMUP_SHARE * tokens / batch_tokens))
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=warmup)
    return dataclasses.replace(config, batch_tokens=batch_tokens, optimizer=optimizer)


def divide(examples: ExampleSet, share: float) -> tuple[ExampleSet, ExampleSet]:
    """Return the examples to train on and those that only tell before from after.

    The latter are spread over each domain; none of them is trained on under another number.

    Raises:
        DataError: there are not two different examples.
    """
    texts = [examples.example(index)[0].tobytes() for index in range(len(examples))]
    distinct = {text: index for index, text in reversed(list(enumerate(texts)))}
    if len(distinct) < 2:
        raise DataError(
            "one example cannot both train and tell whether training helped; give at least two"
        )
    chosen: set[bytes] = set()
    for domain in range(len(examples.domain_names)):
        own = [text for text, index in distinct.items() if examples.domains[index] == domain]
        number = min(_MOST_HELD_OUT, max(1, round(share * len(own))))
        if len(own) > 1:
            chosen |= {own[int(place)] for place in np.linspace(0, len(own), number + 2)[1:-1]}
    if not chosen:  # one of each domain
        chosen.add(next(reversed(distinct)))
    is_held_out = np.array([text in chosen for text in texts])
    held_out = [index for text, index in distinct.items() if text in chosen]
    return examples.subset(np.flatnonzero(~is_held_out)), examples.subset(np.sort(held_out))


def _document_share(examples: ExampleSet) -> float:
    domains = np.unique(examples.domains)
    is_document = [examples.domain_names[d] in examples.document_domains for d in domains]
    if all(is_document):
        return 1.0
    return DOCUMENT_SHARE if any(is_document) else 0.0
