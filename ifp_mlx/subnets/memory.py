"""How much memory a sub-network will take, said before anything is loaded."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ifp_mlx.errors import ResourceError
from ifp_mlx.slicing.repacking import FULL_BITS_REPACKINGS
from ifp_mlx.slicing.stored_units import BLOCK_BYTES
from ifp_mlx.slicing.unit_file import UNIT_FILE
from ifp_mlx.slicing.whole_down import packed_bytes
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.weights import load_model
from ifp_mlx.subnets.process_limits import process_limit_bytes
from ifp_mlx.units.amounts import Amounts
from ifp_mlx.units.model_config import ModelConfig
from ifp_mlx.units.modules import (
    compute_dtype,
    family_of,
    is_packed,
    named_arrays,
    part_arrays,
    part_of,
    stored_bytes,
    unit_arrays,
    unit_layers,
    unit_shape,
)

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
class KVCacheSize:
    """What one layer remembers of a conversation.

    Attributes:
        token_bytes: of one token.
        most_tokens: how many it keeps; None for all.
    """

    token_bytes: int
    most_tokens: int | None = None

    def num_bytes(self, num_tokens: int) -> int:
        """Return what it takes after so many tokens."""
        kept = num_tokens if self.most_tokens is None else min(num_tokens, self.most_tokens)
        return kept * self.token_bytes


@dataclasses.dataclass(frozen=True)
class PrefillSize:
    """The values that exist for each token while a layer reads a prompt.

    Attributes:
        hidden: beside those of units.
        unit: for each unit in use.
        most_units: how many see a token; None for all that are kept.
    """

    hidden: int
    unit: int
    most_units: int | None = None

    def values(self, num_kept_units: int) -> int:
        """Return how many values a token has with K units."""
        in_use = num_kept_units if self.most_units is None else self.most_units
        return self.hidden + min(in_use, num_kept_units) * self.unit


@dataclasses.dataclass(frozen=True)
class CheckpointSizes:
    """What a checkpoint's parts take, in bytes.

    Attributes:
        amounts: of units that can be kept.
        hidden_size: D.
        shared_bytes: everything that holds no units, in the type that is computed in.
        largest_shared_bytes: of one such array, as it is stored.
        unit_bytes: one unit in all layers, in a compact model; without its columns of packed down
            projections.
        exact_downs: for each layer whose packed down projection is not packed again, the bytes of
            one plain column of it and of the whole: the smaller form is kept.
        repacked_columns: one column of all other packed down projections, in the forms that are
            tried: the first with which units take no more than in the source is kept.
        whole_downs: those projections whole, which is what remains where none does.
        dense_unit_bytes: the same in the dense model, with columns as they are stored.
        stored_unit_bytes: one unit of one layer, as it is stored.
        layer_bytes: one dense layer, as it is stored and, if that differs, as it is computed.
        item_bytes: of a number that is computed with.
        kv_caches: what the layers remember.
        num_heads: H.
        prefill: what a token takes while a prompt is read.
        reads_blocks: whole down projections are read for the columns of a few units.
    """

    amounts: Amounts
    hidden_size: int
    shared_bytes: int
    largest_shared_bytes: int
    unit_bytes: int
    exact_downs: tuple[tuple[int, int], ...]
    repacked_columns: tuple[int, ...]
    whole_downs: int
    dense_unit_bytes: int
    stored_unit_bytes: int
    layer_bytes: int
    item_bytes: int
    kv_caches: tuple[KVCacheSize, ...]
    num_heads: int
    prefill: PrefillSize
    reads_blocks: bool

    def predict(self, num_kept_units: int, context_tokens: int) -> MemoryPrediction:
        """Return the peak memory of a sub-network of K units a layer at a context length."""
        context = math.ceil(context_tokens / _KV_STEP_TOKENS) * _KV_STEP_TOKENS
        # While a layer is read: its bytes, the same as arrays, and its columns put together.
        loading = 3 * num_kept_units * self.stored_unit_bytes
        if self.reads_blocks:
            loading += 3 * BLOCK_BYTES
        tokens = min(context_tokens, PREFILL_TOKENS)
        prefill = tokens * self.prefill.values(num_kept_units) * self.item_bytes
        if mx.default_device() == mx.cpu:  # where attention scores exist in memory
            prefill += 2 * self.num_heads * tokens * context * self.item_bytes
        return MemoryPrediction(
            weights_bytes=self.shared_bytes + self._units_bytes(num_kept_units),
            kv_cache_bytes=sum(cache.num_bytes(context) for cache in self.kv_caches),
            working_set_bytes=max(loading, self.largest_shared_bytes, self.layer_bytes, prefill),
        )

    def _units_bytes(self, num_kept_units: int) -> int:
        """Return what K units take."""
        source_bytes = self.amounts.num_units * self.dense_unit_bytes
        if num_kept_units == self.amounts.num_units:
            return source_bytes
        exact = sum(min(num_kept_units * column, whole) for column, whole in self.exact_downs)
        rows_bytes = num_kept_units * self.unit_bytes + exact
        forms = (rows_bytes + num_kept_units * column for column in self.repacked_columns)
        whole_bytes = rows_bytes + self.whole_downs
        return next((form for form in forms if form <= source_bytes), whole_bytes)

    @property
    def dense_bytes(self) -> int:
        """The whole model, in the type that is computed in."""
        return self.shared_bytes + self.amounts.num_units * self.dense_unit_bytes

    def fits_beside_subnetwork(self, context_tokens: int, available_bytes: int) -> bool:
        """Return whether the whole model, a sub-network as large as they come and its KV cache fit.

        What they share is counted once.
        """
        units_bytes = self.amounts.num_units * self.dense_unit_bytes
        subnetwork = self.predict(self.amounts.num_units, context_tokens)
        return subnetwork.total_bytes + units_bytes <= available_bytes

    def largest_k_that_fits(self, context_tokens: int, available_bytes: int) -> int | None:
        """Return the largest K whose peak fits; None if none."""
        for amount in self.amounts.descending():
            if self.predict(amount, context_tokens).total_bytes <= available_bytes:
                return amount
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
    stored, _ = load_model(path, lazy=True)
    sizes = model_sizes(stored, read_config(path), dtype, exact_down=exact_down)
    return dataclasses.replace(
        sizes, reads_blocks=sizes.reads_blocks and not (path / UNIT_FILE).exists()
    )


def model_sizes(
    stored: nn.Module,
    config: ModelConfig,
    dtype: mx.Dtype | None = None,
    *,
    exact_down: bool = False,
) -> CheckpointSizes:
    """Return what the parts of an mlx-lm model take. Evaluates nothing.

    Args:
        stored: with its weights as a checkpoint has them; only their shapes and types count.
        config: of it.
        dtype: as for ``checkpoint_sizes``.
        exact_down: as there.
    """
    kind = family_of(stored).kind
    num_units = unit_shape(stored).num_units
    computed = compute_dtype(stored) if dtype is None else dtype
    unit_bytes = 0
    exact_downs = []
    repacked_columns, whole_downs = [0] * len(FULL_BITS_REPACKINGS), 0
    stored_layers, computed_units = [], 0
    for layer in unit_layers(stored).values():
        in_file = in_memory = 0
        for part in kind.parts:
            module, arrays = part_of(layer, part), part_arrays(layer, part)
            part_bytes = _computed_bytes(module, arrays, dtype)
            in_file += _computed_bytes(module, arrays, None)
            in_memory += part_bytes
            if part.axis == 0 or dtype is not None or not is_packed(module):
                unit_bytes += part_bytes // num_units
            elif exact_down:
                exact_downs.append((config.hidden_size * computed.size, packed_bytes(module)))
            else:
                whole_downs += packed_bytes(module)
                for form, repacking in enumerate(FULL_BITS_REPACKINGS):
                    group_size = max(int(module.group_size), repacking.least_group)
                    bits = repacking.bits + 16 * computed.size / group_size
                    repacked_columns[form] += round(config.hidden_size * bits / 8)
        stored_layers.append(in_file)
        computed_units += in_memory
    inside = {id(array) for array in unit_arrays(stored).values()}
    outside = [array for array in named_arrays(stored).values() if id(array) not in inside]
    layer_bytes = max(stored_bytes(layer) for layer in stored.layers)
    if dtype is not None:
        layer_bytes += max(_module_bytes(layer, dtype) for layer in stored.layers)
    return CheckpointSizes(
        amounts=Amounts.of(config, num_units),
        hidden_size=config.hidden_size,
        shared_bytes=_module_bytes(stored, dtype) - computed_units,
        largest_shared_bytes=max(array.nbytes for array in outside),
        unit_bytes=unit_bytes,
        exact_downs=tuple(exact_downs),
        repacked_columns=tuple(repacked_columns),
        whole_downs=whole_downs,
        dense_unit_bytes=computed_units // num_units,
        stored_unit_bytes=max(stored_layers) // num_units,
        layer_bytes=layer_bytes,
        item_bytes=computed.size,
        kv_caches=_kv_caches(stored, computed),
        num_heads=config.num_attention_heads,
        prefill=_prefill_size(stored, config),
        reads_blocks=kind.columns is not None,
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


def usable_memory_bytes(limit_bytes: int | None = None) -> int:
    """Return how much memory this machine can give: what Metal recommends, or all of it.

    Args:
        limit_bytes: the most that the user allows; None is no limit.
    """
    machine_bytes = _machine_memory_bytes()
    return machine_bytes if limit_bytes is None else min(limit_bytes, machine_bytes)


def _machine_memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = min(total, process_limit_bytes() or total)
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
        f"`keep_units` {largest} is the most that fits"
        if largest is not None
        else "no amount of units fits; use a quantized checkpoint (ifp quantize) or less context"
    )
    raise ResourceError(
        f"{num_kept_units} of {sizes.amounts.num_units} {sizes.amounts.label} need "
        f"{prediction.total_bytes / 1e9:.2f} GB ({prediction.describe()}) at {context_tokens} "
        f"tokens of context, there are "
        f"{available_bytes / 1e9:.2f} GB: {advice}, or `force` to try"
    )


def _module_bytes(module: nn.Module, dtype: mx.Dtype | None) -> int:
    """Return what a module takes: as it is, or dequantized and cast to a type."""
    if dtype is None:
        return stored_bytes(module)
    total = 0
    for name, array in module.items():
        if isinstance(array, mx.array):
            total += _computed_bytes(module, {name: array}, dtype)
    children = module.children().values()
    modules = [child for tree in children for _, child in _modules_in(tree)]
    return total + sum(_module_bytes(child, dtype) for child in modules)


def _computed_bytes(
    module: nn.Module, arrays: Mapping[str, mx.array], dtype: mx.Dtype | None
) -> int:
    """Return what arrays of one module take: as they are, or dequantized and cast to a type."""
    if dtype is None:
        return sum(array.nbytes for array in arrays.values())
    values = 0
    for name, array in arrays.items():
        if not is_packed(module):
            values += array.size
        elif name == "weight":
            values += array.size * 32 // int(module.bits)
        elif name not in ("scales", "biases"):
            values += array.size
    return values * int(dtype.size)


def _modules_in(tree: Any) -> list[tuple[str, nn.Module]]:
    return cast(list[tuple[str, nn.Module]], tree_flatten(tree, is_leaf=nn.Module.is_module))


def _kv_caches(model: nn.Module, dtype: mx.Dtype) -> tuple[KVCacheSize, ...]:
    """Return what each layer remembers, by having the model read one token. Evaluates nothing.

    Families remember in many ways (windows, latent vectors, states of fixed size); the caches that
    mlx-lm makes for them know.
    """
    from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

    caches = make_prompt_cache(model)
    model(mx.array([[0]]), cache=caches)
    sizes = []
    waiting = list(caches)
    while waiting:
        cache = waiting.pop()
        if isinstance(cache, CacheList):
            waiting += cache.caches
        elif isinstance(cache, ArraysCache):
            sizes.append(KVCacheSize(cache.nbytes, most_tokens=1))
        elif cache.keys is not None:
            token_bytes = cache.nbytes // cache.keys.shape[2]
            token_bytes = token_bytes * dtype.size // compute_dtype(model).size
            window = getattr(cache, "max_size", None)
            # A window is cut to its size when a piece of the prompt has been added to it.
            most_tokens = None if window is None else window + PREFILL_TOKENS
            sizes.append(KVCacheSize(token_bytes, most_tokens))
    return tuple(sizes)


def _prefill_size(model: nn.Module, config: ModelConfig) -> PrefillSize:
    kind = config.family.kind
    hidden = 4 * config.hidden_size
    if kind.router is None:
        return PrefillSize(hidden, unit=3)  # gate, up and their product
    gate = next(part for part in kind.parts if part.path.endswith(".gate_proj"))
    expert_width = part_of(next(iter(unit_layers(model).values())), gate).weight.shape[1]
    chosen = int(config.settings[kind.router.chosen])
    return PrefillSize(hidden, 3 * expert_width + 2 * config.hidden_size, most_units=chosen)
