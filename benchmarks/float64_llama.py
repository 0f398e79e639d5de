"""A Llama forward pass in NumPy and float64: what float32 passes are compared with."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def weight(module: nn.Module) -> Array:
    """Return the dequantized weight of a linear layer or an embedding."""
    if "scales" not in module:
        return _wide(module.weight)
    scales, biases = module.scales, module.get("biases")
    if biases is not None:  # affine: or the values would be rounded to the type of the scales
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    form = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return _wide(mx.dequantize(module.weight, scales, biases, **form))


def masked_logits(model: nn.Module, token_ids: list[int], mask: Array) -> Array:
    """Return (T, V) logits of an mlx-lm Llama with its FFN units times an (L, F) mask.

    For models without scaled rotary positions and with tied embeddings.
    """
    sizes = model.args
    num_heads, num_kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
    embeddings = weight(model.model.embed_tokens)
    hidden = embeddings[token_ids]  # (T, D)
    num_tokens = len(token_ids)
    causal = np.tril(np.ones((num_tokens, num_tokens), dtype=bool))
    for layer, layer_mask in zip(model.layers, mask, strict=True):
        inputs = _norm(hidden, layer.input_layernorm, sizes.rms_norm_eps)
        attention = layer.self_attn
        queries = _rotate(_heads(inputs, attention.q_proj, num_heads), sizes.rope_theta)
        keys = _rotate(_heads(inputs, attention.k_proj, num_kv_heads), sizes.rope_theta)
        values = _heads(inputs, attention.v_proj, num_kv_heads)
        keys, values = (np.repeat(x, num_heads // num_kv_heads, axis=0) for x in (keys, values))
        scores = queries @ keys.transpose(0, 2, 1) / np.sqrt(queries.shape[-1])  # (H, T, T)
        scores = np.exp(np.where(causal, scores - scores.max(axis=-1, keepdims=True), -np.inf))
        mixed = scores / scores.sum(axis=-1, keepdims=True) @ values
        hidden = (
            hidden + mixed.transpose(1, 0, 2).reshape(num_tokens, -1) @ weight(attention.o_proj).T
        )
        inputs = _norm(hidden, layer.post_attention_layernorm, sizes.rms_norm_eps)
        gate = inputs @ weight(layer.mlp.gate_proj).T
        units = gate / (1 + np.exp(-gate)) * (inputs @ weight(layer.mlp.up_proj).T)
        hidden = hidden + (units * layer_mask) @ weight(layer.mlp.down_proj).T
    logits: Array = _norm(hidden, model.model.norm, sizes.rms_norm_eps) @ embeddings.T
    return logits


def _wide(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _norm(hidden: Array, norm: nn.Module, epsilon: float) -> Array:
    scale: Array = np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + epsilon)
    return hidden / scale * _wide(norm.weight)


def _heads(inputs: Array, linear: nn.Module, num_heads: int) -> Array:
    projected = inputs @ weight(linear).T
    return projected.reshape(len(inputs), num_heads, -1).transpose(1, 0, 2)  # (H, T, D / H)


def _rotate(heads: Array, theta: float) -> Array:
    half = heads.shape[-1] // 2
    angles = np.arange(heads.shape[1])[:, None] * theta ** (-np.arange(half) / half)  # (T, half)
    first, second = heads[..., :half], heads[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
