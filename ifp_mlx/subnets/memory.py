"""How much memory a sub-network will take, said before anything is loaded."""

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ifp_mlx.errors import ResourceError
from ifp_mlx.slicing.compact import REQUANTIZED_DOWN_BITS, compute_dtype
from ifp_mlx.slicing.streaming import BLOCK_BYTES
from ifp_mlx.slicing.unit_file import SIDE_FILE
from ifp_mlx.slicing.whole_down import packed_bytes
from ifp_mlx.storage.checkpoint import load_model
from ifp_mlx.units import ffn
from ifp_mlx.units.amounts import UNIT_MULTIPLE

PROCESS_BYTES = 200 * 10**6
"""Python, MLX, mlx-lm and the tokenizer before any weights: measured by benchmarks/memory.py."""

PREFILL_TOKENS = 2048
"""mlx-lm reads a prompt in pieces of this many tokens."""

_KV_STEP_TOKENS = 256  # mlx-lm grows its KV cache by this many tokens


@dataclasses.dataclass(frozen=True)
class MemoryPrediction:
    """Peak memory of a sub-network, in bytes.

    Attributes:
        weights_bytes: the compact model in the type it computes in.
        kv_cache_bytes: keys and values at the asked context.
        working_set_bytes: what comes and goes: one layer while it is loaded or while the dense
            model selects, or the activations of a prompt, whichever is most.
        process_bytes: the program itself.
    """

    weights_bytes: int
    kv_cache_bytes: int
    working_set_bytes: int
    process_bytes: int = PROCESS_BYTES

    @property
    def total_bytes(self) -> int:
        """The peak."""
        parts = (self.weights_bytes, self.kv_cache_bytes, self.working_set_bytes)
        return sum(parts) + self.process_bytes

    def describe(self) -> str:
        """Return the parts as one line for people."""
        return (
            f"weights {self.weights_bytes / 1e9:.2f} GB, KV cache "
            f"{self.kv_cache_bytes / 1e9:.2f} GB, working set "
            f"{self.working_set_bytes / 1e9:.2f} GB, program {self.process_bytes / 1e9:.2f} GB"
        )


@dataclasses.dataclass(frozen=True)
class CheckpointSizes:
    """What a checkpoint's parts take, in bytes.

    Attributes:
        num_layers: L.
        num_units: F.
        hidden_size: D.
        shared_bytes: everything outside the FFNs, in the type that is computed in.
        largest_shared_bytes: of one such array, as it is stored.
        unit_bytes: one FFN unit in all layers, in a compact model; without its columns of
            ``exact_downs``.
        exact_downs: for each layer whose packed down projection is not quantized again, the bytes
            of one plain column of it and of the whole: the smaller form is kept.
        dense_unit_bytes: the same in the dense model, with down projections as they are stored.
        stored_unit_bytes: one FFN unit of one layer, as it is stored.
        layer_bytes: one dense layer, as it is stored and, if that differs, as it is computed.
        item_bytes: of a number that is computed with.
        kv_token_bytes: keys and values of one token in all layers.
        num_heads: H.
        has_side_file: units can be read without reading whole down projections.
    """

    num_layers: int
    num_units: int
    hidden_size: int
    shared_bytes: int
    largest_shared_bytes: int
    unit_bytes: int
    exact_downs: tuple[tuple[int, int], ...]
    dense_unit_bytes: int
    stored_unit_bytes: int
    layer_bytes: int
    item_bytes: int
    kv_token_bytes: int
    num_heads: int
    has_side_file: bool

    def predict(self, num_kept_units: int, context_tokens: int) -> MemoryPrediction:
        """Return the peak memory of a sub-network of K units a layer at a context length."""
        context = math.ceil(context_tokens / _KV_STEP_TOKENS) * _KV_STEP_TOKENS
        # While a layer is read: its bytes, the same as arrays, and its columns put together.
        loading = 3 * num_kept_units * self.stored_unit_bytes
        if not self.has_side_file:
            loading += 3 * BLOCK_BYTES
        tokens = min(context_tokens, PREFILL_TOKENS)
        # The gate, up and product of units, beside a few hidden states.
        prefill = tokens * (3 * num_kept_units + 4 * self.hidden_size) * self.item_bytes
        if mx.default_device() == mx.cpu:  # where attention scores exist in memory
            prefill += 2 * self.num_heads * tokens * context * self.item_bytes
        if num_kept_units == self.num_units:
            ffn_bytes = num_kept_units * self.dense_unit_bytes
        else:
            downs = (min(num_kept_units * column, whole) for column, whole in self.exact_downs)
            ffn_bytes = num_kept_units * self.unit_bytes + sum(downs)
        return MemoryPrediction(
            weights_bytes=self.shared_bytes + ffn_bytes,
            kv_cache_bytes=context * self.kv_token_bytes,
            working_set_bytes=max(loading, self.largest_shared_bytes, self.layer_bytes, prefill),
        )

    def largest_k_that_fits(self, context_tokens: int, available_bytes: int) -> int | None:
        """Return the largest K, a multiple of 64 or F, whose peak fits; None if none does."""
        amounts = [self.num_units, *range(self.num_units // 64 * 64, 0, -UNIT_MULTIPLE)]
        for amount in amounts:
            if self.predict(amount, context_tokens).total_bytes <= available_bytes:
                return int(amount)
        return None


def checkpoint_sizes(
    path: Path, dtype: mx.Dtype | None = None, *, exact_down: bool = False
) -> CheckpointSizes:
    """Return what a checkpoint's parts take. Reads headers, no weights.

    Args:
        path: a checkpoint directory, quantized or not.
        dtype: the type that weights are cast to; None computes as they are stored.
        exact_down: quantized down projections are not quantized again.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    stored, config = load_model(path, lazy=True)
    modules = ffn.ffn_modules(stored)
    num_units = ffn.num_units(stored)
    down_name = ffn.ffn_layout(stored.args.model_type).down
    computed = compute_dtype(stored) if dtype is None else dtype
    ffn_bytes = [_stored_bytes(module) for module in modules]
    down = modules[0][down_name]
    hidden_size = int(down.weight.shape[0])
    unit_bytes = 0
    exact_downs = []
    for module, stored_bytes in zip(modules, ffn_bytes, strict=True):
        if dtype is not None:
            unit_bytes += _computed_bytes(module, dtype) // num_units
            continue
        unit_bytes += stored_bytes // num_units
        down = module[down_name]
        if isinstance(down, nn.QuantizedLinear):
            unit_bytes -= _stored_bytes(down) // num_units
            if exact_down:
                exact_downs.append((hidden_size * computed.size, packed_bytes(down)))
            else:
                column_bits = REQUANTIZED_DOWN_BITS + 16 * computed.size // int(down.group_size)
                unit_bytes += hidden_size * column_bits // 8
    measure = _stored_bytes if dtype is None else functools.partial(_computed_bytes, dtype=dtype)
    ffn_computed = sum(measure(module) for module in modules)
    layers = [_stored_bytes(layer) for layer in stored.layers]
    outside = [array for _, array in _arrays(stored) if array.nbytes]
    inside = {id(array) for module in modules for _, array in _arrays(module)}
    return CheckpointSizes(
        num_layers=len(modules),
        num_units=num_units,
        hidden_size=hidden_size,
        shared_bytes=measure(stored) - ffn_computed,
        largest_shared_bytes=max(array.nbytes for array in outside if id(array) not in inside),
        unit_bytes=unit_bytes,
        exact_downs=tuple(exact_downs),
        dense_unit_bytes=ffn_computed // num_units,
        stored_unit_bytes=max(ffn_bytes) // num_units,
        layer_bytes=max(layers)
        + (0 if dtype is None else max(_computed_bytes(layer, dtype) for layer in stored.layers)),
        item_bytes=computed.size,
        kv_token_bytes=_kv_token_bytes(config, computed),
        num_heads=int(config.get("num_attention_heads") or config["n_head"]),
        has_side_file=(path / SIDE_FILE).exists(),
    )


def predict_peak_bytes(
    path: Path,
    num_kept_units: int,
    context_tokens: int,
    dtype: mx.Dtype | None = None,
    *,
    exact_down: bool = False,
) -> MemoryPrediction:
    """Return the peak memory of a sub-network of a checkpoint. Reads headers, no weights.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    sizes = checkpoint_sizes(path, dtype, exact_down=exact_down)
    return sizes.predict(num_kept_units, context_tokens)


def usable_memory_bytes() -> int:
    """Return how much memory this machine can give: what Metal recommends, or all of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if mx.default_device() != mx.cpu:
        recommended = mx.device_info().get("max_recommended_working_set_size")
        if isinstance(recommended, int) and recommended:
            return min(total, recommended)
    return total


def require_memory(
    sizes: CheckpointSizes, num_kept_units: int, context_tokens: int, available_bytes: int
) -> MemoryPrediction:
    """Return the prediction for a sub-network, or refuse it before anything is loaded.

    Raises:
        ResourceError: it does not fit; with the numbers, and the largest K that does.
    """
    prediction = sizes.predict(num_kept_units, context_tokens)
    if prediction.total_bytes <= available_bytes:
        return prediction
    largest = sizes.largest_k_that_fits(context_tokens, available_bytes)
    advice = (
        f"--keep-units {largest} is the most that fits"
        if largest is not None
        else "no amount of units fits; use a quantized checkpoint (ifp quantize) or less context"
    )
    raise ResourceError(
        f"{num_kept_units} of {sizes.num_units} units need {prediction.total_bytes / 1e9:.2f} GB "
        f"({prediction.describe()}) at {context_tokens} tokens of context, this machine has "
        f"{available_bytes / 1e9:.2f} GB: {advice}, or --force to try"
    )


def _arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))


def _stored_bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in _arrays(module))


def _computed_bytes(module: nn.Module, dtype: mx.Dtype) -> int:
    """Return what a module takes with its packed weights dequantized and all cast."""
    values = 0
    leaves = cast(
        list[tuple[str, nn.Module]],
        tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module),
    )
    for _, leaf in leaves:
        if hasattr(leaf, "bits") and "scales" in leaf:
            values += int(leaf.weight.size) * 32 // int(leaf.bits)
            values += int(leaf.bias.size) if "bias" in leaf else 0
        else:
            values += sum(array.size for _, array in _arrays(leaf))
    return values * int(dtype.size)


def _kv_token_bytes(config: dict[str, Any], dtype: mx.Dtype) -> int:
    if config["model_type"] == "gpt2":  # other names, and every head has its own keys
        return 2 * int(config["n_layer"]) * int(config["n_embd"]) * int(dtype.size)
    num_layers, hidden_size = int(config["num_hidden_layers"]), int(config["hidden_size"])
    num_heads = int(config["num_attention_heads"])
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    head_dim = int(config.get("head_dim") or hidden_size // num_heads)
    return 2 * num_layers * num_kv_heads * head_dim * int(dtype.size)
