"""A checkpoint directory written as one GGUF file, for llama.cpp and what is built on it."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind
from mlx.utils import tree_flatten

from ifp_mlx.convert.gguf_architectures import (
    ARCHITECTURES,
    ROPE_FACTORS,
    ROUTER,
    YARN_BETAS,
    GGUFArchitecture,
    llama3_divisors,
)
from ifp_mlx.convert.gguf_vocabulary import Vocabulary, read_vocabulary
from ifp_mlx.convert.progress import Progress, no_progress
from ifp_mlx.errors import ArchitectureError, CheckpointError, UsageError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.files import atomic_path, require_free_disk
from ifp_mlx.storage.weights import load_model
from ifp_mlx.units.families import find_family

KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
"""How matrices can be written; vectors, biases and routers always are float32."""

_BLOCK = 32  # columns of a Q8_0 block


@dataclasses.dataclass(frozen=True)
class _Planned:
    name: str
    array: mx.array
    order: np.ndarray | None
    kind: Kind


def export_gguf(
    checkpoint: Path,
    target: Path,
    kind: str = "f16",
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> int:
    """Write a checkpoint as a GGUF file, whole or not at all, and return its bytes.

    Packed weights are dequantized; tensors pass through memory one at a time.

    Args:
        checkpoint: a directory of one of the families that can also be read from GGUF, with a
            byte-level tokenizer.
        target: the file.
        kind: a key of ``KINDS``.
        overwrite: replace ``target`` if it exists.
        progress: called after each tensor.

    Raises:
        ArchitectureError: the family or one of its settings has no GGUF form.
        CheckpointError: the tokenizer has no GGUF form.
        UsageError: the target exists, or there is no such kind.
        ResourceError: not enough disk.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no GGUF type {kind!r}; there are: {', '.join(KINDS)}")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists already; choose another name or pass `overwrite`")
    config = dict(read_config(checkpoint).content)
    name, architecture = _architecture_of(config)
    _require_fixed(architecture, config)
    vocabulary = read_vocabulary(checkpoint)
    model, _ = load_model(checkpoint, mx.float32, lazy=True)
    config["head_dim"] = config.get("head_dim") or (
        config["hidden_size"] // config["num_attention_heads"]
    )
    planned = [
        _plan(architecture, config, parameter, array, KINDS[kind])
        for parameter, array in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    ]
    model.clear()
    if name == "olmoe" and config.get("tie_word_embeddings", True):  # llama.cpp never ties it
        embedding = next(tensor for tensor in planned if tensor.name == "token_embd.weight")
        planned.append(dataclasses.replace(embedding, name="output.weight"))
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        planned.append(_Planned(ROPE_FACTORS, mx.array(llama3_divisors(config)), None, Kind.F32))
    total = sum(_num_bytes(tensor) for tensor in planned)
    require_free_disk(target, total)
    with atomic_path(target) as temporary:
        writer = gguf.GGUFWriter(temporary, name)
        _add_config(writer, config)
        _add_vocabulary(writer, vocabulary, config)
        for tensor in planned:
            if tensor.kind in (Kind.F32, Kind.F16):
                dtype = np.float32 if tensor.kind == Kind.F32 else np.float16
                shape = tensor.array.shape
                writer.add_tensor_info(tensor.name, shape, np.dtype(dtype), _num_bytes(tensor))
            else:
                shape = gguf.quant_shape_to_byte_shape(tensor.array.shape, tensor.kind)
                writer.add_tensor_info(
                    tensor.name, shape, np.dtype(np.uint8), _num_bytes(tensor), tensor.kind
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        planned.reverse()
        while planned:
            tensor = planned.pop()
            writer.write_tensor_data(_content(tensor))
            done += _num_bytes(tensor)
            progress("writing GGUF", done, total)
        writer.close()
    return target.stat().st_size


def _architecture_of(config: dict[str, Any]) -> tuple[str, GGUFArchitecture]:
    # Mistral models are llama's in GGUF; everything else has its own row.
    model_type = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    for name, architecture in ARCHITECTURES.items():
        if architecture.model_type == model_type:
            return name, architecture
    known = sorted(architecture.model_type for architecture in ARCHITECTURES.values())
    raise ArchitectureError(
        f"{config['model_type']} models cannot be written as GGUF; these can: {', '.join(known)}"
    )


def _require_fixed(architecture: GGUFArchitecture, config: dict[str, Any]) -> None:
    """Refuse a model with a setting of which GGUF takes another value for granted."""
    for key, value in architecture.fixed(config).items():
        if config.get(key, value) != value:
            raise ArchitectureError(
                f"{architecture.model_type} models with {key} {config[key]} cannot be written as "
                f"GGUF, for which it always is {value}"
            )


def _plan(
    architecture: GGUFArchitecture,
    config: dict[str, Any],
    parameter: str,
    array: mx.array,
    kind: Kind,
) -> _Planned:
    name = architecture.tensor_name(parameter)
    if architecture.norm_offset and parameter.endswith("norm.weight"):
        array = array + architecture.norm_offset
    order = architecture.row_order(name, config)
    if array.ndim == 1 or name.endswith((".bias", f"{ROUTER}.weight")):
        kind = Kind.F32
    elif kind == Kind.Q8_0 and array.shape[-1] % _BLOCK:
        kind = Kind.F16
    # ``order`` says which GGUF row each row comes from; its inverse puts them back.
    return _Planned(name, array, None if order is None else np.argsort(np.array(order)), kind)


def _num_bytes(tensor: _Planned) -> int:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    return int(tensor.array.size // block_size * block_bytes)


def _content(tensor: _Planned) -> np.ndarray:
    if tensor.array.ndim == 3:  # expert by expert: quantizing takes several times the memory
        return np.stack([_content(dataclasses.replace(tensor, array=e)) for e in tensor.array])
    values = np.array(tensor.array)
    if tensor.order is not None:
        values = values[tensor.order]
    if not np.isfinite(values).all():
        raise CheckpointError(f"{tensor.name} holds values that are not numbers (NaN or infinity)")
    return np.ascontiguousarray(gguf.quants.quantize(values, tensor.kind))


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    kind = find_family(config["model_type"]).kind
    num_units = config[kind.config_fields[0]]
    writer.add_name(f"{config['model_type']} {num_units} {kind.label}")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config.get("max_position_embeddings") or 2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or 10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    if kind.router is not None:
        width = config.get("moe_intermediate_size") or config["intermediate_size"]
        writer.add_expert_count(num_units)
        writer.add_expert_used_count(config[kind.router.chosen])
        writer.add_expert_feed_forward_length(width)
    uses_window = config["model_type"].startswith("gemma") or config["model_type"] == "gpt_oss"
    if uses_window and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config.get("rope_local_base_freq"):
        writer.add_rope_freq_base_swa(config["rope_local_base_freq"])
    _add_rope_scaling(writer, config.get("rope_scaling") or {})


def _add_rope_scaling(writer: gguf.GGUFWriter, scaling: dict[str, Any]) -> None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ("default", "llama3"):  # Llama 3 has its divisors in a tensor
        return
    if kind not in ("linear", "yarn"):
        raise ArchitectureError(f"rope scaling {kind!r} cannot be written as GGUF")
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        for key in YARN_BETAS:
            if key in scaling:
                getattr(writer, f"add_rope_scaling_yarn_{key}")(scaling[key])


def _add_vocabulary(
    writer: gguf.GGUFWriter, vocabulary: Vocabulary, config: dict[str, Any]
) -> None:
    # Some models have more rows in their embedding than tokens; each row needs a name.
    missing = config["vocab_size"] - len(vocabulary.tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list([*vocabulary.tokens, *(f"[PAD{n}]" for n in range(missing))])
    writer.add_token_types([*vocabulary.types, *[gguf.TokenType.UNUSED] * missing])
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.adds_bos)
    for add, token_id in (
        (writer.add_bos_token_id, vocabulary.bos_id),
        (writer.add_eos_token_id, vocabulary.eos_id),
        (writer.add_pad_token_id, vocabulary.pad_id),
    ):
        if token_id is not None:
            add(token_id)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
