"""The stages of an answer, through the functions that ``ifp generate`` calls.

Selecting, cutting, reading the prompt and decoding follow one another as they do there, around a
tokenizer that stands in for one. Left out are opening files, the chat template and the look at the
slices for values that are not finite, which belong to the rooms above this one.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifp_mlx.chat.generation import Answer
from ifp_mlx.chat.kv_cache import KVCache
from ifp_mlx.chat.sampling import KVCacheOptions, SamplingOptions
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.slicing.kernel_check import check_quantized_kernels
from ifp_mlx.slicing.repacking import RequantizationError

_KV_OPTIONS = KVCacheOptions()
_SAMPLING = SamplingOptions()


class _Letters:
    """The tokenizer of a model of random weights: each token is a letter, none ends an answer."""

    eos_token_id = None
    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [0] * len(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "a" * len(token_ids)

    def apply_chat_template(self) -> None:
        """Do nothing: mlx-lm looks for parameters of it."""


_TOKENIZER = TokenizerWrapper(_Letters())


def cut(model: nn.Module, selection: Selection) -> nn.Module:
    """Return the compact model of a selection as it is cut from a model in memory. Evaluates."""
    error = RequantizationError()
    compact = slice_model(model, selection, error=error)
    mx.eval(compact.parameters(), error.squared_difference, error.squared_reference)
    return check_quantized_kernels(compact)


def first_token(model: nn.Module, prompt_ids: Sequence[int]) -> Iterator[str]:
    """Return the answer to a prompt, begun: its first token is there. Evaluates.

    mlx-lm has the device work on the second token by then. That goes on until the answer is let
    go of, so whoever takes the time looks at the clock first.
    """
    answer = iter(_answer(model, prompt_ids, _SAMPLING.max_new_tokens))
    next(answer)
    return answer


def read_prompt(model: nn.Module, prompt_ids: Sequence[int]) -> KVCache:
    """Return a KV cache that holds a prompt of T > 1 tokens but for its last one. Evaluates.

    That one is what the first step of an answer reads.
    """
    kv_cache = KVCache.empty(model, _KV_OPTIONS)
    begun = list(prompt_ids[:-1])
    for _ in generate_step(mx.array(begun), model, max_tokens=0, prompt_cache=kv_cache.layers):
        pass
    kv_cache.note(begun)
    return kv_cache


def decode(
    model: nn.Module,
    prompt_ids: Sequence[int],
    kv_cache: KVCache,
    num_tokens: int,
    num_samples: int,
) -> list[list[int]]:
    """Return the new tokens of each sample. Evaluates.

    One sample is answered as ``ifp generate`` answers, greedily. Several share the KV cache of
    their prompt and are drawn at temperature 1 by mlx-lm's batches, as ``ifp serve`` answers
    requests that come at once.

    Args:
        model: any mlx-lm model.
        prompt_ids: the prompt.
        kv_cache: of ``read_prompt``; it is not changed, so that more can be drawn from it.
        num_tokens: new tokens a sample.
        num_samples: B.
    """
    if num_samples == 1:
        own_cache = copy.deepcopy(kv_cache)
        for _ in _answer(model, prompt_ids, num_tokens, own_cache):
            pass
        return [own_cache.token_ids[len(prompt_ids) :]]
    response: Any = batch_generate(
        model,
        _TOKENIZER,
        [[prompt_ids[-1]]] * num_samples,
        prompt_caches=[kv_cache.layers] * num_samples,
        max_tokens=num_tokens,
        sampler=make_sampler(1.0),
        return_token_ids=True,
    )
    return cast(list[list[int]], response.token_ids)


def _answer(
    model: nn.Module,
    prompt_ids: Sequence[int],
    num_tokens: int,
    kv_cache: KVCache | None = None,
) -> Answer:
    if kv_cache is None:
        kv_cache = KVCache.empty(model, _KV_OPTIONS)
    return Answer(model, _TOKENIZER, prompt_ids, kv_cache, _SAMPLING, _KV_OPTIONS, num_tokens)
