"""Prompts read by a part of a model, answers written by the whole of it."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import pytest

from ifp_mlx.chat.reading import ReadsWithPart
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.compact import slice_model

ModelFactory = Callable[..., nn.Module]

PROMPT = [(7 * position) % 61 + 1 for position in range(40)]


def generate(model: nn.Module, prompt: Sequence[int]) -> list[int]:
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(list(prompt)), model, max_tokens=6, prefill_step_size=16)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5", "qwen3_moe"])
def test_a_whole_part_reads_as_the_whole_does(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family)
    assert generate(ReadsWithPart(model, model, 4), PROMPT) == generate(model, PROMPT)


def test_all_but_the_tail_is_read_by_the_part(tiny_model: ModelFactory) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    whole = tiny_model("llama")
    part = slice_model(whole, select_random(whole, 64))
    caches = make_prompt_cache(whole)
    logits = ReadsWithPart(whole, part, 5)(mx.array([PROMPT]), cache=caches)
    expected = make_prompt_cache(whole)
    part(mx.array([PROMPT[:-5]]), cache=expected)
    assert mx.array_equal(logits, whole(mx.array([PROMPT[-5:]]), cache=expected))
    assert [cache.offset for cache in caches] == [len(PROMPT)] * 3
    plain = make_prompt_cache(whole)
    whole(mx.array([PROMPT]), cache=plain)
    assert not mx.allclose(caches[2].state[0], plain[2].state[0])


def test_a_prompt_no_longer_than_the_tail_is_read_by_the_whole(tiny_model: ModelFactory) -> None:
    whole = tiny_model("llama")
    part = slice_model(whole, select_random(whole, 64))
    assert generate(ReadsWithPart(whole, part, 64), PROMPT) == generate(whole, PROMPT)


def test_all_of_a_long_prompt_is_read_by_the_part(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    monkeypatch.setattr("ifp_mlx.chat.reading.LONGEST_WITH_TAIL", len(PROMPT) - 1)
    whole = tiny_model("llama")
    part = slice_model(whole, select_random(whole, 64))
    caches, expected = make_prompt_cache(whole), make_prompt_cache(whole)
    logits = ReadsWithPart(whole, part, 5)(mx.array([PROMPT]), cache=caches)
    assert mx.array_equal(logits, part(mx.array([PROMPT]), cache=expected))
    assert mx.array_equal(caches[2].state[0], expected[2].state[0])
