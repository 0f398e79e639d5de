"""Prefill once, then several samples of the one prompt: the pieces that the benchmarks time."""

import collections
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ifp_mlx.selection.masks import top_k_indices
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import ResidentUnits, compact_skeleton, fill_layers
from ifp_mlx.units import ffn

PREFILL_STEP_SIZE = 8192
"""Prompt tokens in one forward pass; of longer prompts, chunks, all in one evaluation."""


LAYERS_AT_ONCE = 4
"""Layers of a prefill that are built before the device starts on them."""

PIECES_AHEAD = 2
"""How many such pieces the host starts ahead of the device. Each holds its activations until it is
done: of a long prompt, all layers at once would hold more than the model's weights."""


class ChosenUnits(Selection):
    """A selection straight from ``top_k_indices``: in range, ascending and unique as it is made.

    Checking it would wait for the device between selecting and slicing.
    """

    def validate(self, model: nn.Module | None = None) -> "ChosenUnits":
        """Return self."""
        return self


def select_lazily(
    predictor: SparsityPredictor, prompt_ids: Sequence[int], num_kept_units: int
) -> ChosenUnits:
    """Return the units that a predictor selects for a prompt. Lazy.

    The caller must not slice with it unless the scores are finite, which random weights of
    ordinary size make them.
    """
    scores = predictor.scores_of(prompt_ids)
    return ChosenUnits(top_k_indices(scores, num_kept_units), scores.shape[-1], predictor.name)


def prefill(model: nn.Module, prompt_ids: mx.array) -> tuple[mx.array, list[Any]]:
    """Return the (V,) logits after a prompt of (T,) ids, and the KV cache that holds it. Lazy.

    The vocabulary's logits are computed for the last position alone, in the same pass: there is
    no separate step for the last token.
    """
    kv_cache = make_prompt_cache(model)
    for start in range(0, prompt_ids.size, PREFILL_STEP_SIZE):
        chunk = prompt_ids[None, start : start + PREFILL_STEP_SIZE]  # (1, T)
        hidden = model.model(chunk, cache=kv_cache)
    return _logits(model, hidden[:, -1:])[0, -1], kv_cache


def first_token(
    dense: nn.Module, predictor: SparsityPredictor, prompt_ids: Sequence[int], num_kept_units: int
) -> tuple[mx.array, list[Any]]:
    """Return the first token of the sub-network that a prompt selects, and its KV cache.

    Nothing waits for the host in between: the device selects while the host builds the first
    layers, their slices included.
    """
    selection = select_lazily(predictor, prompt_ids, num_kept_units)
    mx.async_eval(selection.indices)
    return first_token_of(dense, selection, mx.array(list(prompt_ids)))


def first_token_of(
    dense: nn.Module, selection: Selection, prompt_ids: mx.array
) -> tuple[mx.array, list[Any]]:
    """Return the first token of a sub-network after a prompt of (T,) ids, and its KV cache.

    Each layer is sliced as the prefill comes to it.
    """
    selection.validate(dense)
    compact = compact_skeleton(dense, selection)
    # Closed, it lets go of the compact model, which would else wait for the garbage collector.
    with contextlib.closing(fill_layers(compact, selection, ResidentUnits(dense))) as filling:
        _start_by_layers(compact, before_layer=lambda: next(filling, None))
        logits, kv_cache = prefill(compact, prompt_ids)
    return mx.argmax(logits), kv_cache


def started_by_layers(model: nn.Module) -> nn.Module:
    """Return a copy of ``model``, sharing its arrays, for prefills.

    The device starts on its first layers while the host still builds the next; what is computed
    is the same.
    """
    started: nn.Module = ffn.clone_module(model)
    _start_by_layers(started)
    return started


def repeat_kv_cache(kv_cache: Sequence[KVCache], num_samples: int) -> list[KVCache]:
    """Return a KV cache for ``num_samples`` samples of the prompt that ``kv_cache`` holds. Lazy.

    The original stays as it is, so that more samples can be drawn from it later.
    """
    repeated = []
    for layer in kv_cache:
        copy = KVCache()
        keys, values = layer.keys_and_values()
        copy.keys = mx.repeat(keys[..., : layer.offset, :], num_samples, axis=0)
        copy.values = mx.repeat(values[..., : layer.offset, :], num_samples, axis=0)
        copy.offset = layer.offset
        repeated.append(copy)
    return repeated


def decode(
    model: nn.Module, kv_cache: list[Any], first_logits: mx.array, num_tokens: int, num_samples: int
) -> list[list[int]]:
    """Return the new tokens of each sample, drawn at temperature 1. Evaluates.

    As in mlx-lm's ``generate_step``, the next step is on its way before this one's tokens are
    read on the host.

    Args:
        model: any mlx-lm model.
        kv_cache: holds the prompt once for each sample; it grows.
        first_logits: (V,) after the prompt, from which every sample's first token is drawn.
        num_tokens: new tokens a sample, the first one included.
        num_samples: B.
    """
    logits = mx.broadcast_to(first_logits, (num_samples, first_logits.size))  # (B, V)
    tokens = mx.random.categorical(logits)  # (B,)
    mx.async_eval(tokens)
    columns = []
    for count in range(1, num_tokens + 1):
        if count < num_tokens:
            following = mx.random.categorical(model(tokens[:, None], cache=kv_cache)[:, -1])
            mx.async_eval(following)
        columns.append(tokens.tolist())
        tokens = following if count < num_tokens else tokens
    return [list(sample) for sample in zip(*columns, strict=True)]


def decode_with_mlx_lm(
    model: nn.Module, kv_cache: list[Any], first_logits: mx.array, num_tokens: int
) -> list[int]:
    """Return the new tokens of one sample through mlx-lm's own loop, for comparison. Evaluates."""
    first = mx.argmax(first_logits).reshape(1)
    steps = generate_step(
        first,
        model,
        max_tokens=num_tokens - 1,
        prompt_cache=kv_cache,
        sampler=mx.random.categorical,
    )
    return [cast(int, first.item()), *(cast(int, token) for token, _ in steps)]


def _start_by_layers(model: nn.Module, before_layer: Callable[[], Any] = lambda: None) -> None:
    """Start each few layers of ``model`` when they are built; changes it in place.

    Args:
        model: an mlx-lm model that calls its layers in order.
        before_layer: called before each call of a layer.
    """
    pace = _Pace(len(model.layers))
    for layer in model.layers:
        layer._before_layer = before_layer
        layer._pace = pace
        layer_class: Any = type(layer)
        layer.__class__ = _started_class(layer_class)


class _Pace:
    """Keeps the device busy and the host no further ahead of it than ``PIECES_AHEAD``."""

    def __init__(self, num_layers: int):
        self._num_layers = num_layers
        self._num_built = 0
        self._pieces: collections.deque[mx.array] = collections.deque()

    def after_layer(self, hidden: mx.array) -> None:
        self._num_built += 1
        if self._num_built == self._num_layers:  # of this pass; what is left starts with its result
            self._num_built = 0
            self._pieces.clear()
        elif self._num_built % LAYERS_AT_ONCE == 0:
            mx.async_eval(hidden)
            self._pieces.append(hidden)
            if len(self._pieces) > PIECES_AHEAD:
                mx.eval(self._pieces.popleft())


@functools.cache
def _started_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._before_layer()
        output = layer_class.__call__(self, *args, **kwargs)
        self._pace.after_layer(output)
        return output

    return type(f"Started{layer_class.__name__}", (layer_class,), {"__call__": call})


def _logits(model: nn.Module, hidden: mx.array) -> mx.array:
    if "lm_head" in model:
        return model.lm_head(hidden)  # type: ignore[no-any-return]
    return model.model.embed_tokens.as_linear(hidden)  # type: ignore[no-any-return]
