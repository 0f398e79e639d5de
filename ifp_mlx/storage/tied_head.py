"""Whether a model's head is its embedding: what config.json leaves open, the weights say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.notices import warn_once
from ifp_mlx.storage.tensor_files import StoredTensor
from ifp_mlx.units.model_config import ModelConfig

_KEY = "tie_word_embeddings"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight")
_BLOCK_BYTES = 1 << 24


def settle_head(
    config: ModelConfig, tensors: Mapping[str, StoredTensor], path: Path
) -> dict[str, Any]:
    """Return config.json's content with ``tie_word_embeddings`` as the weights have it.

    A head that differs from the embedding is used, whatever config.json says, as in transformers
    5; one that is the same bytes is a copy. Where there is none, the embedding is the head.

    Args:
        config: of the checkpoint.
        tensors: of the checkpoint.
        path: the checkpoint directory, for messages.
    """
    content = dict(config.content)
    said = config.settings.get(_KEY, content.get(_KEY))
    head = next((tensor for name, tensor in tensors.items() if _is_head(name)), None)
    if said is False or (head is None and said is not None):
        return content
    if head is None:
        if not _is_tied_by_default(config.family.model_type):
            warn_once(
                f"{path}: config.json does not say {_KEY} and the weights have no head; the "
                "embedding is taken for it"
            )
        return config.with_settings({_KEY: True})
    embedding = next((t for name, t in tensors.items() if name.endswith(_EMBEDDINGS)), None)
    is_copy = embedding is not None and _are_same_bytes(head, embedding)
    if said and not is_copy:
        warn_once(
            f"{path}: config.json says that the embedding is the head, too, but {head.name} "
            "differs from it and is used"
        )
    return config.with_settings({_KEY: is_copy})


def without_tied_head(
    weights: dict[str, mx.array], model: nn.Module, *, is_tied: bool
) -> dict[str, mx.array]:
    """Return the weights without a head for which the model has no place.

    Args:
        weights: as they are stored.
        model: just built.
        is_tied: the head is a copy of the embedding.

    Raises:
        CheckpointError: it is not, and would be lost.
    """
    heads = [name for name in weights if _is_head(name)]
    # Gemma 3 makes a head and drops it again when it finds no weights for it.
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    has_place = any("lm_head" in name or name.startswith("output") for name, _ in parameters)
    if not heads or (has_place and not (is_tied and hasattr(model, _KEY))):
        return weights
    if not is_tied:
        raise CheckpointError(
            f"the weights have a head of their own ({heads[0]}), for which mlx-lm has no place in "
            "models of this family; they cannot be read"
        )
    prefixes = tuple(name.removesuffix("weight") for name in heads)
    return {name: array for name, array in weights.items() if not name.startswith(prefixes)}


def _is_head(name: str) -> bool:
    return name in ("output.weight", "model.output.weight") or name.endswith("lm_head.weight")


def _is_tied_by_default(model_type: str) -> bool:
    """Return what transformers takes where config.json says nothing."""
    from transformers import CONFIG_MAPPING

    try:
        return bool(getattr(CONFIG_MAPPING[model_type](), _KEY, False))
    except KeyError:  # a family that transformers does not have
        return False


def _are_same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        left = one.num_bytes
        while left > 0:
            size = min(left, _BLOCK_BYTES)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True
