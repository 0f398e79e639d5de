"""A head beside a tied embedding: a copy is dropped, another one is never lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.weights import load_model

CheckpointFactory = Callable[..., Path]
EditConfig = Callable[..., None]
TOKENS = mx.array([[3, 60, 5, 41]])
TIED = ("llama", "qwen2", "gemma", "gemma2", "gemma3_text", "olmo2", "cohere", "starcoder2", "gpt2")


def read_weights(folder: Path) -> dict[str, mx.array]:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    return weights


@pytest.fixture
def tied_checkpoint(tiny_checkpoint: CheckpointFactory) -> CheckpointFactory:
    """Return a factory like ``tiny_checkpoint``; its checkpoints have no head."""

    def make(family: str) -> Path:
        folder = tiny_checkpoint(family)
        weights = read_weights(folder)
        weights.pop("lm_head.weight", None)  # mlx-lm's Gemma 3 is made with one
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
        return folder

    return make


def add_head(folder: Path, *, factor: float = 1.0) -> None:
    """Add a multiple of the embedding to a checkpoint's weights as a head."""
    weights = read_weights(folder)
    name = next(n for n in weights if n.endswith(("embed_tokens.weight", "wte.weight")))
    weights["lm_head.weight"] = weights[name] * factor
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


@pytest.mark.parametrize("said", [True, ...], ids=["tied", "not said"])
@pytest.mark.parametrize("family", TIED)
def test_a_head_that_equals_the_embedding_is_dropped(
    tied_checkpoint: CheckpointFactory, edit_config: EditConfig, family: str, said: Any
) -> None:
    folder = tied_checkpoint(family)
    expected = load_model(folder)[0](TOKENS)
    add_head(folder)
    edit_config(folder, tie_word_embeddings=said)
    model, config = load_model(folder)
    assert mx.array_equal(model(TOKENS), expected)
    assert config["tie_word_embeddings"] is True
    assert "lm_head" not in model


@pytest.mark.parametrize("said", [True, ...], ids=["tied", "not said"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2", "smollm3", "gemma3_text"])
def test_a_head_of_its_own_is_used_whatever_the_config_says(
    tied_checkpoint: CheckpointFactory, edit_config: EditConfig, family: str, said: Any
) -> None:
    folder = tied_checkpoint(family)
    tied = load_model(folder)[0](TOKENS)
    add_head(folder, factor=-2.0)
    edit_config(folder, tie_word_embeddings=said)
    model, config = load_model(folder)
    assert mx.allclose(model(TOKENS), -2.0 * tied, atol=1e-4)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", ["gemma", "gemma2", "cohere", "gpt2"])
def test_a_head_of_its_own_without_a_place_for_it_is_refused(
    tied_checkpoint: CheckpointFactory, family: str
) -> None:
    folder = tied_checkpoint(family)
    add_head(folder, factor=2.0)
    with pytest.raises(CheckpointError, match=r"a head of their own \(lm_head\.weight\)"):
        load_model(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3", "ernie4_5", "gemma"])
def test_without_a_head_the_embedding_is_it(
    tied_checkpoint: CheckpointFactory, edit_config: EditConfig, family: str
) -> None:
    folder = tied_checkpoint(family)
    expected = load_model(folder)[0](TOKENS)
    edit_config(folder, tie_word_embeddings=...)
    assert mx.array_equal(load_model(folder)[0](TOKENS), expected)
