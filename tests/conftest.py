"""Tiny models, no network, and the same random numbers every time."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before anything imports mlx.core

import hypothesis  # noqa: E402
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
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
_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
_GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
_LATENT = {  # keys and values are made of one narrow vector
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DELTA_NET = {  # two layers of three that remember a state instead of keys and values
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 3,
    "partial_rotary_factor": 0.5,
    "head_dim": 8,
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
    "cohere2": {"head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 2},
    "ernie4_5": {"head_dim": 8, "use_bias": True},
    "exaone4": {
        "head_dim": 8,
        "rope_scaling": None,
        "sliding_window": 16,
        "sliding_window_pattern": "LLG",
    },
    "glm": {"head_dim": 8},
    "helium": {"head_dim": 8, "attention_bias": False, "mlp_bias": False},
    "hunyuan_v1_dense": {"head_dim": 8},
    "internlm2": {},
    "internlm3": {"bias": True},
    "mimo": {},
    "minicpm": {
        "dim_model_base": 16,
        "scale_depth": 1.4,
        "scale_emb": 12.0,
        "tie_word_embeddings": False,
    },
    "ministral3": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "tie_word_embeddings": False},
    "olmo3": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "seed_oss": {"head_dim": 8, "mlp_bias": True},
    "qwen3_5": _DELTA_NET,
    "mellum": {
        **_EXPERTS,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            name: {"rope_theta": 10000.0, "rope_type": "default"}
            for name in ("sliding_attention", "full_attention")
        },
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {
        **_EXPERTS, "head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": [1],
    },
    "qwen3_next": {
        **_EXPERTS, **_DELTA_NET, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_5_moe": {**_EXPERTS, **_DELTA_NET, "shared_expert_intermediate_size": 96},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4,
            "long_mscale": 1.0, "short_mscale": 1.0,
        },
    },
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 1.0,
        "attention_bias": False,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": {
            "rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 64, "truncate": False,
        },
    },
    "deepseek_v2": {
        **_GROUPED, **_LATENT, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1,
        "rope_scaling": {
            "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "deepseek_v3": {**_GROUPED, **_LATENT, "first_k_dense_replace": 1},
    "glm4_moe": {
        **_GROUPED, "head_dim": 8, "use_qk_norm": True, "attention_bias": False,
        "partial_rotary_factor": 0.5, "first_k_dense_replace": 1, "rope_scaling": None,
        "norm_topk_prob": True,
    },
    "glm4_moe_lite": {**_GROUPED, **_LATENT, "first_k_dense_replace": 1},
    "dots1": {
        **_GROUPED, "head_dim": 8, "first_k_dense_replace": 1, "norm_topk_prob": True,
    },
    "afmoe": {
        **_EXPERTS, "head_dim": 8, "n_group": 2, "topk_group": 1, "num_shared_experts": 1,
        "num_dense_layers": 1, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "lfm2_moe": {
        **_EXPERTS, "use_expert_bias": True, "num_dense_layers": 1, "norm_eps": 1e-5,
        "conv_bias": False, "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64, "use_bias": False,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_use_aux_free": True,
    },
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
        "moe_intermediate_size": 64, "head_dim": 8, "global_head_dim": 16,
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip


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


@pytest.fixture(scope="session")
def write_tiny_checkpoint(
    tiny_config: Callable[..., dict[str, Any]], tiny_model: Callable[..., nn.Module]
) -> Callable[..., Path]:
    """Return a function that fills a new folder with a tiny checkpoint and a tokenizer."""

    def write(folder: Path, family: str = "llama", **changes: Any) -> Path:
        sizes = {"vocab_size": BYTE_VOCAB_SIZE, "max_position_embeddings": 512, **changes}
        folder.mkdir()
        config = {**tiny_config(family, **sizes), "eos_token_id": 2}
        (folder / "config.json").write_text(json.dumps(config))
        weights = dict(tree_flatten(tiny_model(family, **sizes).parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        write_byte_tokenizer(folder)
        return folder

    return write


@pytest.fixture
def tiny_checkpoint(
    tmp_path: Path, write_tiny_checkpoint: Callable[..., Path]
) -> Callable[..., Path]:
    """Return a factory: family -> the directory of a tiny float32 checkpoint with a tokenizer."""

    def make(family: str = "llama", name: str = "tiny", **changes: Any) -> Path:
        return write_tiny_checkpoint(tmp_path / name, family, **changes)

    return make


# Names of the tensors in a GGUF file come from the gguf package, not from the table under test.
_GGUF_ARCHITECTURES = {"gemma3_text": "gemma3"}


def _interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder query or key rows as llama's GGUF files have them: halves of a head in turn."""
    head_dim = rows.shape[0] // num_heads
    order = [
        head * head_dim + half * head_dim // 2 + pair
        for head in range(num_heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    return rows[order]


@pytest.fixture
def tiny_gguf(
    tmp_path: Path,
    tiny_config: Callable[..., dict[str, Any]],
    tiny_model: Callable[..., nn.Module],
) -> Callable[..., Path]:
    """Return a factory: family -> a GGUF file of the tiny model with a byte-level tokenizer.

    ``kinds`` maps parameter names, without layer and ".weight", to quantization types.
    """
    import gguf
    from tokenizers import pre_tokenizers

    def make(
        family: str = "llama",
        name: str = "tiny.gguf",
        kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
        metadata: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        sizes = {"vocab_size": BYTE_VOCAB_SIZE, **changes}
        config = tiny_config(family, **sizes)
        architecture = _GGUF_ARCHITECTURES.get(family, family)
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
        if "head_dim" in config:
            writer.add_key_length(config["head_dim"])
        if "sliding_window" in config:
            writer.add_sliding_window(config["sliding_window"])
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokens += ["ab", "12"]
        tokens += [f"<unused{n}>" for n in range(BYTE_VOCAB_SIZE - len(tokens))]
        control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([control if token in special else normal for token in tokens])
        writer.add_token_merges(["a b", "1 2"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(CHAT_TEMPLATE)
        for key, value in (metadata or {}).items():
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        names = gguf.get_tensor_name_map(
            next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture),
            config["num_hidden_layers"],
        )
        parameters = cast(
            list[tuple[str, mx.array]], tree_flatten(tiny_model(family, **sizes).parameters())
        )
        for parameter, array in parameters:
            values = np.array(array)
            if architecture.startswith("gemma") and parameter.endswith("norm.weight"):
                values = values + 1
            if architecture == "llama" and parameter.split(".")[-2] in ("q_proj", "k_proj"):
                part = {"q": "num_attention_heads", "k": "num_key_value_heads"}
                values = _interleave(values, config[part[parameter.split(".")[-2][0]]])
            kind = (kinds or {}).get(".".join(parameter.split(".")[-3:-1]))
            tensor_name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
            assert tensor_name is not None, parameter
            if kind is None:
                writer.add_tensor(tensor_name, values)
            else:
                writer.add_tensor(tensor_name, _quantized(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def _quantized(values: np.ndarray, kind: Any) -> np.ndarray:
    """Return blocks of a kind: of these values if gguf can quantize so, else of random bytes."""
    import gguf

    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (values.shape[0], values.shape[1] // block_size, block_bytes)
        blocks = np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)
        # Half-precision scales with a moderate exponent, wherever this kind has them.
        for start in (0, 2, block_bytes - 2):
            blocks[..., start + 1] = 0x18
        return blocks.reshape(values.shape[0], -1)


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[[Path], None]:
    """Return the function that writes a byte-level tokenizer's files into a folder."""
    return write_byte_tokenizer


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Change a checkpoint's config.json; a value of ``...`` removes the key."""

    def edit(folder: Path, **changes: Any) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return edit
