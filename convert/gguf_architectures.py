"""What differs between the model families that come as GGUF: names, config keys, row order."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ifp_mlx.convert.gguf_reader import GGUFFile
from ifp_mlx.convert.gguf_weights import read_dense
from ifp_mlx.errors import ArchitectureError, CheckpointError

Config = dict[str, Any]

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Gemma normalizes before and after each block, so "ffn_norm" is another norm there.
_GEMMA_NAMES = _NAMES | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROUTER = "ffn_gate_inp"


def _expert_names(router: str, stacks: str) -> dict[str, str]:
    return {ROUTER: router} | {
        f"ffn_{name}_exps": f"{stacks}.{name}_proj" for name in ("gate", "up", "down")
    }


_EXPERT_AXES = {ROUTER: 2, "ffn_gate_exps": 3, "ffn_up_exps": 3, "ffn_down_exps": 3}
_SWITCH_NAMES = _NAMES | _expert_names("mlp.gate", "mlp.switch_mlp")
_GPT_OSS_NAMES = {
    **{name: path for name, path in _NAMES.items() if name != "ffn_norm"},
    **_expert_names("mlp.router", "mlp.experts"),
    "post_attention_norm": "post_attention_layernorm",
    "attn_sinks": "self_attn.sinks",
}
_BARE = frozenset({"self_attn.sinks"})  # parameters whose path ends without "weight"
_TENSOR_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_PARAMETER_NAME = re.compile(r"(?:model\.layers\.(\d+)\.)?([\w.]+?)(?:\.(weight|bias))?")
ROPE_FACTORS = "rope_freqs.weight"
YARN_BETAS = ("beta_fast", "beta_slow")
_MAX_SIZE = 2**24
_YARN_WEIGHTS = ("attn_factor", "yarn_ext_factor", "yarn_attn_factor")  # all 1 unless said
_LLAMA3_FREQUENCIES = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclasses.dataclass(frozen=True)
class GGUFArchitecture:
    """How one family is written as GGUF.

    Attributes:
        model_type: the name in config.json.
        class_name: the transformers class, for ``architectures`` in config.json.
        names: GGUF tensor name, without layer and suffix -> parameter path.
        interleaved_rotary: query and key rows of a head are stored in pairs, see ``row_order``.
        norm_offset: was added to the norm weights for GGUF and is taken away again.
        extra_config: config keys that only this family has.
        fixed: config keys, for a configuration, with the one value that llama.cpp computes with.
    """

    model_type: str
    class_name: str
    names: Mapping[str, str]
    interleaved_rotary: bool = False
    norm_offset: float = 0.0
    extra_config: Callable[[GGUFFile], Config] = lambda file: {}
    fixed: Callable[[Config], Config] = lambda config: {}

    def parameter_name(self, tensor_name: str) -> str | None:
        """Return the parameter path of a GGUF tensor; None for one that config.json replaces.

        Raises:
            ArchitectureError: the tensor is none of this family's.
        """
        if tensor_name == ROPE_FACTORS:
            return None
        match = _TENSOR_NAME.fullmatch(tensor_name)
        if match is None or match[2] not in self.names:
            raise ArchitectureError(
                f"the GGUF file has a tensor {tensor_name!r}, which {self.model_type} models "
                "that can be converted do not have"
            )
        layer, path = match[1], self.names[match[2]]
        name = path if path in _BARE else f"{path}.{match[3]}"
        return name if layer is None else f"model.layers.{layer}.{name}"

    def tensor_name(self, parameter_name: str) -> str:
        """Return the GGUF name of a parameter, the inverse of ``parameter_name``.

        Raises:
            ArchitectureError: GGUF files of this family have no such tensor.
        """
        match = _PARAMETER_NAME.fullmatch(parameter_name)
        parts = {path: name for name, path in self.names.items()}
        if match is None or match[2] not in parts:
            raise ArchitectureError(
                f"{self.model_type} models have no GGUF tensor for {parameter_name!r}"
            )
        layer = "" if match[1] is None else f"blk.{match[1]}."
        return f"{layer}{parts[match[2]]}.{match[3] or 'weight'}"

    def row_order(self, tensor_name: str, config: Config) -> mx.array | None:
        """Return the order in which to take a tensor's rows, or None to leave them.

        GGUF stores the query and key rows of a llama head so that the two values that rotary
        position embedding turns together are neighbours: (H, d/2, 2). Hugging Face and MLX have
        the halves one after the other: (H, 2, d/2).
        """
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        part = tensor_name.split(".")[-2]
        if not self.interleaved_rotary or part not in heads:
            return None
        num_heads, head_dim = config[heads[part]], config["head_dim"]
        rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
        return mx.array(rows.swapaxes(1, 2).reshape(-1))


def _gemma_config(file: GGUFFile) -> Config:
    return {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": _head_dim(file)}


def _gemma2_config(file: GGUFFile) -> Config:
    config = _gemma_config(file) | {
        "attn_logit_softcapping": _number(file, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _number(file, "final_logit_softcapping", 30.0),
        "sliding_window": _size(file, "attention.sliding_window", 4096),
    }
    # The 27B model, the one with 46 layers, scales queries by another width than its heads'.
    if _number(file, "block_count") == 46:
        config["query_pre_attn_scalar"] = _number(file, "embedding_length") // _number(
            file, "attention.head_count"
        )
    return config


def _gemma3_config(file: GGUFFile) -> Config:
    config = _gemma_config(file) | {
        "sliding_window": _size(file, "attention.sliding_window"),
        "sliding_window_pattern": 6,
        "rope_local_base_freq": _number(file, "rope.freq_base_swa", 10_000.0),
    }
    if _number(file, "block_count") == 62:  # the 27B model, as above
        config["query_pre_attn_scalar"] = _number(file, "embedding_length") // _number(
            file, "attention.head_count"
        )
    return config


def _expert_config(file: GGUFFile, count_key: str) -> Config:
    """Return the keys of every mixture of experts, whose stacks are checked before any is read.

    Raises:
        CheckpointError: a layer has no experts, or another number of them than the file says.
    """
    count, used = int(_number(file, "expert_count")), int(_number(file, "expert_used_count"))
    if not 0 < used <= count:
        raise CheckpointError(f"{file.path} says that a token sees {used} of {count} experts")
    for layer in range(_size(file, "block_count")):
        for name, num_axes in _EXPERT_AXES.items():
            tensor = file.tensors.get(f"blk.{layer}.{name}.weight")
            if tensor is None or (len(tensor.shape), tensor.shape[0]) != (num_axes, count):
                raise CheckpointError(
                    f"{file.path} has no tensor blk.{layer}.{name}.weight of {count} experts; "
                    "fetch the file again"
                )
    return {count_key: count, "num_experts_per_tok": used}


def _qwen3_moe_config(file: GGUFFile) -> Config:
    width = _size(file, "expert_feed_forward_length")
    return _expert_config(file, "num_experts") | {"moe_intermediate_size": width}


def _gpt_oss_config(file: GGUFFile) -> Config:
    return _expert_config(file, "num_local_experts") | {
        "intermediate_size": _size(file, "expert_feed_forward_length"),
        "sliding_window": _size(file, "attention.sliding_window"),
    }


def _qwen3_moe_fixed(config: Config) -> Config:
    return {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _olmoe_fixed(config: Config) -> Config:
    return {"norm_topk_prob": False, "num_key_value_heads": config["num_attention_heads"]}


def _gpt_oss_fixed(config: Config) -> Config:
    kinds = ("sliding_attention", "full_attention")
    return {"layer_types": [kinds[layer % 2] for layer in range(config["num_hidden_layers"])]}


ARCHITECTURES: dict[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture("llama", "LlamaForCausalLM", _NAMES, interleaved_rotary=True),
    "qwen2": GGUFArchitecture("qwen2", "Qwen2ForCausalLM", _NAMES),
    "qwen3": GGUFArchitecture("qwen3", "Qwen3ForCausalLM", _NAMES),
    "gemma2": GGUFArchitecture(
        "gemma2", "Gemma2ForCausalLM", _GEMMA_NAMES, norm_offset=1.0, extra_config=_gemma2_config
    ),
    "gemma3": GGUFArchitecture(
        "gemma3_text", "Gemma3ForCausalLM", _GEMMA_NAMES, norm_offset=1.0,
        extra_config=_gemma3_config,
    ),
    "qwen3moe": GGUFArchitecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", _SWITCH_NAMES, extra_config=_qwen3_moe_config,
        fixed=_qwen3_moe_fixed,
    ),
    "olmoe": GGUFArchitecture(
        "olmoe", "OlmoeForCausalLM", _SWITCH_NAMES,
        extra_config=lambda file: _expert_config(file, "num_experts"), fixed=_olmoe_fixed,
    ),
    "gpt-oss": GGUFArchitecture(
        "gpt_oss", "GptOssForCausalLM", _GPT_OSS_NAMES, extra_config=_gpt_oss_config,
        fixed=_gpt_oss_fixed,
    ),
}  # fmt: skip


def architecture_of(file: GGUFFile) -> GGUFArchitecture:
    """Return the table row for a GGUF file.

    Raises:
        ArchitectureError: the family is not in the table, or one of dense models has experts.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ArchitectureError(
            f"{file.path} has the architecture {name!r:.60}; GGUF files of these are converted: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    architecture = ARCHITECTURES[name]
    if file.metadata.get(f"{name}.expert_count") and ROUTER not in architecture.names:
        mixtures = sorted(name for name, row in ARCHITECTURES.items() if ROUTER in row.names)
        raise ArchitectureError(
            f"{file.path} is a mixture-of-experts model with the architecture {name!r}; such "
            f"models of these are converted: {', '.join(mixtures)}"
        )
    return architecture


def config_of(file: GGUFFile) -> Config:
    """Return the config.json content that a GGUF file's metadata and tensors describe.

    Raises:
        ArchitectureError: the family is not supported.
        CheckpointError: a value is missing or not of the expected kind.
    """
    architecture = architecture_of(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} has no tensor token_embd.weight; is it a whole model?")
    num_heads = _size(file, "attention.head_count")
    config: Config = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "vocab_size": embedding.shape[0],
        "hidden_size": _size(file, "embedding_length"),
        "intermediate_size": _size(file, "feed_forward_length"),
        "num_hidden_layers": _size(file, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _size(file, "attention.head_count_kv", num_heads),
        "head_dim": _head_dim(file),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _number(file, "rope.freq_base", 10_000.0),
        "max_position_embeddings": _size(file, "context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "hidden_act": "silu",
    }
    scaling = _rope_scaling(file, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config | architecture.extra_config(file) | architecture.fixed(config)


def _number(file: GGUFFile, key: str, default: float | None = None) -> float:
    """Return the number at ``ARCHITECTURE.key``; floats as short as float32 allows."""
    full_key = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(full_key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(
            f"{file.path}: {full_key} is {'missing' if value is None else 'not one number'}; "
            "this file cannot be converted"
        )
    # 9.999999747378752e-06 is what 1e-05 becomes in float32; write 1e-05.
    return value if isinstance(value, int) else float(str(np.float32(value)))


def _size(file: GGUFFile, key: str, default: int | None = None) -> int:
    """Return the size at ``ARCHITECTURE.key``, which no file that is whole has beyond reason."""
    size = _number(file, key, default)
    if not 1 <= size <= _MAX_SIZE or size != int(size):
        raise CheckpointError(f"{file.path} is damaged: it says that {key} is {size:g}")
    return int(size)


def _head_dim(file: GGUFFile) -> int:
    heads = _size(file, "attention.head_count")
    width = _size(file, "attention.key_length", _size(file, "embedding_length") // heads)
    if width % 2:
        raise CheckpointError(f"{file.path} is damaged: its heads are {width} values wide")
    return width


def _rope_scaling(file: GGUFFile, config: Config) -> Config | None:
    """Return ``rope_scaling`` for config.json.

    Raises:
        CheckpointError: positions are scaled in a way that config.json cannot say.
    """
    dimensions = _number(file, "rope.dimension_count", config["head_dim"])
    if dimensions != config["head_dim"]:
        raise _not_said(file, f"positions in {dimensions} of {config['head_dim']} values of a head")
    scaling = _said_scaling(file, config)
    if ROPE_FACTORS not in file.tensors:
        return scaling
    if scaling is not None:
        raise _not_said(file, f"rope scaling {scaling['type']!r} along with rope_freqs")
    return _llama3_scaling(file, config)


def _said_scaling(file: GGUFFile, config: Config) -> Config | None:
    """Return the scaling that the metadata say, as llama.cpp reads them; None for none."""
    prefix = f"{file.metadata['general.architecture']}.rope"
    factor = _number(file, "rope.scaling.factor", _number(file, "rope.scale_linear", 0.0))
    kind = file.metadata.get(f"{prefix}.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn") or factor < 0:
        raise _not_said(file, f"rope scaling {kind!r:.60} by {factor:g}")
    for key in _YARN_WEIGHTS:
        if kind == "yarn" and _number(file, f"rope.scaling.{key}", 1.0) != 1.0:
            raise _not_said(file, f"rope scaling with {key}")
    if kind == "yarn" and _number(file, "rope.scaling.yarn_log_multiplier", 0.0):
        raise _not_said(file, "rope scaling with yarn_log_multiplier")
    if kind == "none" or factor in (0.0, 1.0):
        return None
    scaling: Config = {"type": kind, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        length = config["max_position_embeddings"]
        original = _number(file, "rope.scaling.original_context_length", length)
        scaling["original_max_position_embeddings"] = int(original)
        for key in YARN_BETAS:
            if f"{prefix}.scaling.yarn_{key}" in file.metadata:
                scaling[key] = _number(file, f"rope.scaling.yarn_{key}")
    return scaling


def _not_said(file: GGUFFile, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file.path} has {what}, which config.json cannot say; it cannot be converted"
    )


def _llama3_scaling(file: GGUFFile, config: Config) -> Config:
    """Return the Llama 3 scaling whose divisors the file has precomputed, after checking them."""
    stored = np.array(read_dense(file, file.tensors[ROPE_FACTORS]))
    factor = float(stored.max())
    if math.isfinite(factor) and factor >= 1.0:
        scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3_FREQUENCIES}
        expected = llama3_divisors(config | {"rope_scaling": scaling})
        if stored.shape == expected.shape and np.allclose(stored, expected, rtol=1e-3):
            return scaling
    raise CheckpointError(
        f"{file.path}: its rope_freqs are not those of Llama 3 and cannot be converted"
    )


def llama3_divisors(config: Config) -> np.ndarray:
    """Return what Llama 3 divides each rotary frequency by, (head_dim / 2,) float32.

    Long wavelengths are divided by the factor, short ones are kept, those between are mixed.
    """
    scaling, head_dim = config["rope_scaling"], config["head_dim"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    exponents = np.arange(0, head_dim, 2) / head_dim
    wavelengths = 2 * np.pi * config["rope_theta"] ** exponents
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return np.asarray(divisors, dtype=np.float32)
