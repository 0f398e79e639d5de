"""The sparsity predictor: reads an instruction, scores every FFN unit of every layer."""

import dataclasses
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import UsageError
from ifp_mlx.selection.reading import pad_right
from ifp_mlx.selection.top_k import standardised
from ifp_mlx.units.modules import trunk

HEAD_TOKENS = 256
"""How many tokens at the start of an instruction the predictor reads."""

TAIL_TOKENS = 256
"""How many tokens at its end: of a longer instruction the middle is left out."""

DEFAULT_RANK = 128
"""Width between the feature and the scores, as in the paper."""


def instruction_window(token_ids: Sequence[int]) -> list[int]:
    """Return the tokens that the predictor reads: the first 256 and the last 256.

    Raises:
        UsageError: there is no token.
    """
    if not len(token_ids):
        raise UsageError("the predictor needs an instruction of at least one token")
    if len(token_ids) > HEAD_TOKENS + TAIL_TOKENS:
        token_ids = [*token_ids[:HEAD_TOKENS], *token_ids[-TAIL_TOKENS:]]
    return [int(token) for token in token_ids]


class PredictorHead(nn.Module):
    """From an instruction's feature to scores: prior + expand(project(norm(feature))).

    The expansion starts at zero, so that an untrained head is the calibrated prior.

    Attributes:
        prior: (L, F) float32 scores of an average instruction, standardised per layer.
    """

    def __init__(
        self, feature_dims: int, prior: mx.array, rank: int = DEFAULT_RANK, *, seed: int = 0
    ):
        super().__init__()
        self.prior = standardised(prior)
        self.project = nn.Linear(feature_dims, rank)
        # Drawn from a key of its own: the global generator depends on what ran before.
        bound = feature_dims**-0.5
        draw = mx.random.uniform(-bound, bound, (rank, feature_dims), key=mx.random.key(seed))
        self.project.weight, self.project.bias = draw, mx.zeros((rank,))
        self.expand = nn.Linear(rank, prior.size, bias=False)
        self.expand.weight = mx.zeros_like(self.expand.weight)

    def __call__(self, features: mx.array) -> mx.array:
        """Map (B, P) float features to (B, L, F) float32 scores, standardised per layer."""
        features = mx.fast.layer_norm(features.astype(mx.float32), None, None, 1e-5)
        change = self.expand(self.project(features)).reshape(-1, *self.prior.shape)
        return standardised(self.prior + change)


@dataclasses.dataclass(frozen=True)
class SparsityPredictor:
    """A language model that reads, and a head that scores.

    The reader is the base model itself, before any of the adapter's changes: its weights are in
    memory already, so the head is all that an adapter must store.

    Attributes:
        reader: an mlx-lm model; only its trunk is used, not the logits.
        head: from features to scores.
    """

    reader: nn.Module
    head: PredictorHead

    def features(self, token_ids: mx.array, lengths: mx.array) -> mx.array:
        """Return the (B, 2 D) float32 features of right-padded instructions.

        Args:
            token_ids: (B, T) int32, padded on the right with any token.
            lengths: (B,) int32, 1 <= length <= T.
        """
        return reader_features(self.reader, token_ids, lengths)

    def scores(self, token_ids: mx.array, lengths: mx.array | None = None) -> mx.array:
        """Return the (B, L, F) float32 scores of right-padded instructions. Lazy.

        Args:
            token_ids: (B, T) int32, padded on the right with any token, cut to the window.
            lengths: (B,) int32; None means that no row is padded.
        """
        if lengths is None:
            lengths = mx.full((token_ids.shape[0],), token_ids.shape[1], dtype=mx.int32)
        return self.head(self.features(token_ids, lengths))

    def scores_of(self, texts: Sequence[Sequence[int]]) -> mx.array:
        """Return the (N, L, F) float32 scores of instructions of any length. Lazy.

        Raises:
            UsageError: one has no token.
        """
        return self.scores(*pad_right([instruction_window(text) for text in texts]))


def reader_features(reader: nn.Module, token_ids: mx.array, lengths: mx.array) -> mx.array:
    """Return the final token's hidden state beside the mean over tokens: (B, 2 D) float32.

    The last layer's normed hidden state of the final token is the paper's feature; the mean adds
    what a causal model forgets on the way there, raw documents above all.
    """
    hidden = trunk(reader)(token_ids, None).astype(mx.float32)  # (B, T, D)
    positions = mx.arange(token_ids.shape[1])
    inside = (positions < lengths[:, None]).astype(mx.float32)[..., None]  # (B, T, 1)
    mean = (hidden * inside).sum(axis=1) / lengths[:, None]
    last = mx.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return mx.concatenate([_unit_rms(last), _unit_rms(mean)], axis=-1)


def _unit_rms(vectors: mx.array) -> mx.array:
    return vectors * mx.rsqrt(vectors.square().mean(axis=-1, keepdims=True) + 1e-6)
