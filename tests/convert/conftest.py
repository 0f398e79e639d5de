"""GGUF files of tiny mixtures of experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from mlx.utils import tree_flatten

BYTE_VOCAB_SIZE = 264
_ARCHITECTURES = {"qwen3_moe": "qwen3moe", "olmoe": "olmoe", "gpt_oss": "gpt-oss"}
# What GGUF files of the family can say, besides untied outputs.
_CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": []},
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {},
}


@pytest.fixture(scope="session")
def tiny_mixture(tiny_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return a factory: family -> the model that ``tiny_mixture_gguf`` writes."""

    def make(family: str, **changes: Any) -> nn.Module:
        sizes = {"vocab_size": BYTE_VOCAB_SIZE, "tie_word_embeddings": False}
        return tiny_model(family, **sizes, **_CHANGES[family], **changes)

    return make


@pytest.fixture
def tiny_mixture_gguf(
    tmp_path: Path,
    tiny_gguf: Callable[..., Path],
    tiny_config: Callable[..., dict[str, Any]],
    tiny_mixture: Callable[..., nn.Module],
) -> Callable[..., Path]:
    """Return a factory: family -> a GGUF file of the tiny mixture with a byte-level tokenizer.

    ``kinds`` maps names of tensors, without layer and ".weight", to quantization types, ``edits``
    maps whole names to what is written instead of the values, None for nothing.
    """

    def make(
        family: str,
        name: str = "mixture.gguf",
        kinds: dict[str, Kind] | None = None,
        edits: dict[str, np.ndarray | None] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Path:
        config = tiny_config(family, **_CHANGES[family])
        architecture = _ARCHITECTURES[family]
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
        writer.add_key_length(config.get("head_dim", 8))
        writer.add_expert_count(8)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if family != "olmoe":
            width = config.get("moe_intermediate_size", config["intermediate_size"])
            writer.add_expert_feed_forward_length(width)
        if family == "gpt_oss":
            writer.add_sliding_window(config["sliding_window"])
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
            writer.add_rope_scaling_orig_ctx_len(
                config["rope_scaling"]["original_max_position_embeddings"]
            )
        for key, field in gguf.GGUFReader(tiny_gguf(name=f"tokenizer-{name}")).fields.items():
            if key.startswith("tokenizer."):
                item = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], item)
        for key, value in (metadata or {}).items():
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        names = gguf.get_tensor_name_map(
            next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture),
            config["num_hidden_layers"],
        )
        parameters = cast(
            list[tuple[str, mx.array]], tree_flatten(tiny_mixture(family).parameters())
        )
        for parameter, array in parameters:
            # transformers calls the stacks so, whose names the gguf package knows.
            published = parameter.replace("switch_mlp", "experts")
            tensor_name = names.get_name(published, try_suffixes=(".weight", ".bias"))
            assert tensor_name is not None, parameter
            if parameter.endswith("sinks"):
                tensor_name += ".weight"
            values = (edits or {}).get(tensor_name, np.array(array))
            if values is None:
                continue
            kind = (kinds or {}).get(tensor_name.removesuffix(".weight").split(".")[-1])
            if kind is None:
                writer.add_tensor(tensor_name, values)
            else:
                blocks = gguf.quants.quantize(values, kind)
                writer.add_tensor(tensor_name, blocks, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make
