"""Checks of this machine: the exactness that everything rests on, its kernels, and a little speed.

They need no model and no network: small models with random weights are made here.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import get_total_parameters

from ifp_mlx.selection.selectors import select_random
from ifp_mlx.selection.top_k import top_k_indices
from ifp_mlx.slicing.compact import slice_model, slice_rows
from ifp_mlx.units.masks import set_unit_masks, with_unit_masks
from ifp_mlx.units.modules import dense_weight

_CPU_LIMIT = 1e-5  # float32 logits of the small models are of size 1
_GPU_LIMIT = 1e-4  # GPU kernels add in another order for other widths
_BFLOAT16_LIMIT = 5e-2  # 8 bits of mantissa, a few layers
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {"tie_word_embeddings": False},
    "starcoder2": {"norm_epsilon": 1e-5},
}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One check: what was compared, how far it was off, and how far it may be."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit; NaN is not."""
        return self.error <= self.limit


@dataclasses.dataclass(frozen=True)
class Speed:
    """Decoding speed of a model with K units a layer, tokens a second, batch 1."""

    num_kept_units: int
    num_parameters: int
    tokens_per_s: float


def run_checks() -> Iterator[Check]:
    """Yield each check as it is done. Evaluates."""
    limit = _CPU_LIMIT if mx.default_device() == mx.cpu else _GPU_LIMIT
    for family in _FAMILIES:
        yield Check(f"slicing equals masking: {family}, float32", _slicing_error(family), limit)
    error = _slicing_error("llama", mx.bfloat16)
    yield Check("slicing equals masking: llama, bfloat16", error, _BFLOAT16_LIMIT)
    yield Check("quantized rows are gathered bit for bit", _quantized_row_error(), 0.0)
    yield Check("quantized product equals dequantized", _quantized_product_error(), 1e-3)
    yield Check("top-k keeps exactly K, ties to the lower index", _top_k_error(), 0.0)
    yield Check("decoding from the KV cache equals reading at once", _kv_cache_error(), limit)
    yield Check("attention kernel equals its definition", _attention_error(), limit)


def measure_speed(
    *, num_layers: int = 4, hidden_size: int = 1024, num_units: int = 4096, num_tokens: int = 24
) -> Iterator[Speed]:
    """Yield the decoding speed of a random model, dense and cut to 2/3, 1/2 and 1/4. Evaluates.

    float32 on a CPU, where half types are not accelerated, bfloat16 elsewhere.
    """
    model = _random_model(
        "llama",
        hidden_size=hidden_size,
        intermediate_size=num_units,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 256,
        vocab_size=8192,
    )
    if mx.default_device() != mx.cpu:
        model.set_dtype(mx.bfloat16)
    for share in (1.0, 2 / 3, 1 / 2, 1 / 4):
        kept = round(share * num_units / 64) * 64
        cut = model if kept == num_units else slice_model(model, select_random(model, kept))
        mx.eval(cut.parameters())
        yield Speed(kept, get_total_parameters(cut), _decoding_speed(cut, num_tokens))


def _random_model(family: str, **changes: Any) -> nn.Module:
    from mlx_lm.utils import _get_classes

    config = {"model_type": family, **_SIZES, **_FAMILIES[family], **changes}
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    keys = iter(mx.random.split(mx.random.key(5), 400))

    def randomise(array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape, key=next(keys))
        return noise / array.shape[-1] ** 0.5 if array.ndim > 1 else 1.0 + 0.1 * noise

    model.update(tree_map(randomise, model.parameters()))
    mx.eval(model.parameters())
    return cast(nn.Module, model)


def _tokens(vocab_size: int = 101) -> mx.array:
    return mx.random.randint(0, vocab_size, (1, 20), key=mx.random.key(2))


def _largest_difference(one: mx.array, other: mx.array) -> float:
    difference = mx.abs(one.astype(mx.float32) - other.astype(mx.float32))
    return cast(float, difference.max().item())


def _slicing_error(family: str, dtype: mx.Dtype = mx.float32) -> float:
    model = _random_model(family)
    model.set_dtype(dtype)
    selection = select_random(model, 128, seed=9)
    masked = with_unit_masks(model)
    set_unit_masks(masked, selection.pick.mask())
    return _largest_difference(masked(_tokens()), slice_model(model, selection)(_tokens()))


def _quantized_row_error() -> float:
    linear = nn.Linear(128, 96, bias=False)
    linear.weight = mx.random.normal((96, 128), key=mx.random.key(1))
    quantized = nn.QuantizedLinear.from_linear(linear, 64, 4)
    rows = mx.array([0, 3, 17, 64, 95])
    whole = dense_weight(quantized)[rows]
    return _largest_difference(dense_weight(slice_rows(quantized, rows)), whole)


def _quantized_product_error() -> float:
    linear = nn.Linear(128, 96, bias=False)
    linear.weight = mx.random.normal((96, 128), key=mx.random.key(1)) / 128**0.5
    quantized = nn.QuantizedLinear.from_linear(linear, 64, 4)
    values = mx.random.normal((5, 128), key=mx.random.key(3))
    return _largest_difference(quantized(values), values @ dense_weight(quantized).T)


def _top_k_error() -> float:
    scores = np.random.default_rng(0).integers(0, 5, (3, 192)).astype(np.float32)
    expected = np.stack([np.sort(np.argsort(-row, kind="stable")[:64]) for row in scores])
    return float(np.abs(np.array(top_k_indices(mx.array(scores), 64)) - expected).max())


def _kv_cache_error() -> float:
    model, tokens = _random_model("llama"), _tokens()
    kv_cache = make_prompt_cache(model)
    steps = [model(tokens[:, :12], kv_cache)]
    steps += [model(tokens[:, i : i + 1], kv_cache) for i in range(12, 20)]
    return _largest_difference(mx.concatenate(steps, axis=1), model(tokens))


def _attention_error() -> float:
    keys = mx.random.split(mx.random.key(4), 3)
    query, key, value = (mx.random.normal((1, 4, 16, 64), key=k) for k in keys)
    fast = mx.fast.scaled_dot_product_attention(query, key, value, scale=0.125, mask="causal")
    scores = 0.125 * query @ key.transpose(0, 1, 3, 2)  # (B, H, T, T)
    causal = mx.triu(mx.full((16, 16), -mx.inf), k=1)
    return _largest_difference(fast, mx.softmax(scores + causal, axis=-1) @ value)


def _decoding_speed(model: nn.Module, num_tokens: int) -> float:
    kv_cache = make_prompt_cache(model)
    token = mx.zeros((1, 1), dtype=mx.int32)
    step: Callable[[], mx.array] = lambda: model(token, kv_cache)  # noqa: E731
    for _ in range(3):
        mx.eval(step())  # warm up
    start = time.perf_counter()
    for _ in range(num_tokens):
        mx.eval(step())
    return num_tokens / (time.perf_counter() - start)
