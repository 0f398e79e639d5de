"""Tiny models, no network, and the same random numbers every time."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before anything imports mlx.core

import hypothesis  # noqa: E402
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import pytest  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("ci")

# Small, and no two axes alike: a swapped pair of axes must fail.
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
_FAMILY_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 8.0,
    },
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8.0,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10000.0,
        "rope_global_base_freq": 1000000.0,
    },
    "olmo2": {},
    "granite": {
        "attention_multiplier": 0.25,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "smollm3": {},
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 0.25},
    "stablelm": {
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "use_qkv_bias": False,
    },
    "phi3": {"tie_word_embeddings": False},
    "glm4": {
        "attention_bias": False,
        "head_dim": 8,
        "partial_rotary_factor": 0.5,
        "rope_traditional": True,
    },
    "starcoder2": {"norm_epsilon": 1e-5},
    "gpt2": {
        "n_ctx": 128,
        "n_embd": 48,  # F is 4 * n_embd here: 192, as in the others
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 128,
        "layer_norm_epsilon": 1e-5,
    },
    "phi": {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "num_key_value_heads": 4},
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def loopback_only(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        raise AssertionError(f"a test tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", loopback_only)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    mx.random.seed(7)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., dict[str, Any]]:
    """Return a factory: family -> the config.json of a tiny model of it."""

    def make(family: str = "llama", **changes: Any) -> dict[str, Any]:
        return {"model_type": family, **_SIZES, **_FAMILY_SPECIFIC[family], **changes}

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., dict[str, Any]]) -> Callable[..., nn.Module]:
    """Return a factory: family -> a tiny float32 mlx-lm model with random weights."""
    from mlx_lm.utils import _get_classes

    def make(family: str = "llama", **changes: Any) -> nn.Module:
        config = tiny_config(family, **changes)
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
        keys = iter(list(mx.random.split(mx.random.key(11), 400)))

        def randomise(array: mx.array) -> mx.array:
            noise = mx.random.normal(array.shape, key=next(keys))
            # Wide enough that no unit is negligible, around 1 for the norms' vectors.
            return 0.15 * noise if array.ndim > 1 else 1.0 + 0.15 * noise

        model.update(tree_map(randomise, model.parameters()))
        model.eval()
        mx.eval(model.parameters())
        return model  # type: ignore[no-any-return]

    return make


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTE_VOCAB_SIZE = 264  # 256 bytes, three special tokens, and five ids that no text uses


def write_byte_tokenizer(folder: Path) -> None:
    """Write the files of a byte-level tokenizer with a chat template: one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|im_start|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def tiny_checkpoint(
    tmp_path: Path,
    tiny_config: Callable[..., dict[str, Any]],
    tiny_model: Callable[..., nn.Module],
) -> Callable[..., Path]:
    """Return a factory: family -> the directory of a tiny float32 checkpoint with a tokenizer."""

    def make(family: str = "llama", name: str = "tiny", **changes: Any) -> Path:
        sizes = {"vocab_size": BYTE_VOCAB_SIZE, "max_position_embeddings": 512, **changes}
        folder = tmp_path / name
        folder.mkdir()
        config = {**tiny_config(family, **sizes), "eos_token_id": 2}
        (folder / "config.json").write_text(json.dumps(config))
        weights = dict(tree_flatten(tiny_model(family, **sizes).parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        write_byte_tokenizer(folder)
        return folder

    return make
