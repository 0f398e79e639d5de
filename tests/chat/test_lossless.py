"""A sub-network drafts, the dense model checks: the reply is the dense model's."""

import itertools
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from ifp_mlx.chat.conversation import Conversation, KVCacheOptions, SamplingOptions
from ifp_mlx.errors import UsageError
from ifp_mlx.selection.masks import top_k_indices
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.storage.checkpoint import load_model, load_tokenizer
from ifp_mlx.units import ffn

Parts = tuple[nn.Module, nn.Module, Any]
GREEDY = SamplingOptions(max_new_tokens=30)
PENALIZED = SamplingOptions(max_new_tokens=30, repetition_penalty=1.3)
PROMPTS = ["hi", "what is 2+2?", "write a poem about the sea", "x", "def f():\n    pass"]


@pytest.fixture
def parts(tiny_checkpoint: Callable[..., Path]) -> Parts:
    """Return a dense model, a draft cut from it, and the tokenizer."""
    folder = tiny_checkpoint()
    dense, _ = load_model(folder)
    scores = mx.random.uniform(shape=(len(ffn.ffn_modules(dense)), ffn.num_units(dense)))
    selection = Selection(top_k_indices(scores, 128), ffn.num_units(dense), "random")
    return dense, slice_model(dense, selection), load_tokenizer(folder)


def replies(
    conversation: Conversation, prompts: list[str] = PROMPTS, sampling: SamplingOptions = GREEDY
) -> list[str]:
    return ["".join(conversation.reply(prompt, sampling)) for prompt in prompts]


def test_lossless_equals_the_dense_model_over_a_conversation(parts: Parts) -> None:
    dense, draft, tokenizer = parts
    checked = Conversation(dense, tokenizer, 512, draft_model=draft)
    assert replies(checked) == replies(Conversation(dense, tokenizer, 512))
    assert checked.stats is not None
    assert checked.stats.cached_prompt_tokens > 0


def test_lossless_is_penalized_for_repetition_as_the_dense_model_is(parts: Parts) -> None:
    dense, draft, tokenizer = parts
    expected = replies(Conversation(dense, tokenizer, 512), PROMPTS[:3], PENALIZED)
    for model in (draft, dense):  # one that is refused at times, one that never is
        checked = Conversation(dense, tokenizer, 512, draft_model=model)
        assert replies(checked, PROMPTS[:3], PENALIZED) == expected
    assert replies(Conversation(dense, tokenizer, 512), PROMPTS[:3]) != expected


def test_lossless_is_penalized_for_repeating_the_prompt(parts: Parts) -> None:
    dense, draft, tokenizer = parts
    options = SamplingOptions(max_new_tokens=12, repetition_penalty=1e6)
    for start in range(0, 90, 18):  # some of these texts hold what would be said to them
        text = string.printable[start : start + 18]
        plain = Conversation(dense, tokenizer, 512).complete(text, options)
        checked = Conversation(dense, tokenizer, 512, draft_model=draft).complete(text, options)
        assert "".join(checked) == "".join(plain)


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 8])
def test_lossless_does_not_depend_on_the_draft_length(parts: Parts, num_draft_tokens: int) -> None:
    dense, draft, tokenizer = parts
    checked = Conversation(
        dense, tokenizer, 512, draft_model=draft, num_draft_tokens=num_draft_tokens
    )
    assert replies(checked, PROMPTS[:2]) == replies(
        Conversation(dense, tokenizer, 512), PROMPTS[:2]
    )


def test_lossless_accepts_everything_from_an_equal_draft(parts: Parts) -> None:
    dense, draft, tokenizer = parts
    same = Conversation(dense, tokenizer, 512, draft_model=dense)
    replies(same, ["hi"])
    other = Conversation(dense, tokenizer, 512, draft_model=draft)
    replies(other, ["hi"])
    assert same.stats is not None
    assert other.stats is not None
    assert same.stats.accepted_tokens == same.stats.drafted_tokens == 24  # 4 of every 5 of 30
    # A reply that ends within a draft: the check that was cut short counts, too.
    list(same.reply("more", SamplingOptions(max_new_tokens=8)))
    assert (same.stats.accepted_tokens, same.stats.drafted_tokens) == (7, 8)
    assert other.stats.accepted_tokens < other.stats.drafted_tokens


@pytest.mark.parametrize("num_pieces", range(1, 9))
def test_lossless_goes_on_exactly_after_an_interruption(parts: Parts, num_pieces: int) -> None:
    dense, draft, tokenizer = parts

    def interrupted_then_again(conversation: Conversation) -> str:
        reply = conversation.reply("hello", GREEDY)
        for _ in itertools.islice(reply, num_pieces):
            pass
        reply.close()  # type: ignore[attr-defined]
        return "".join(conversation.reply("go on", GREEDY))

    # The KV caches must hold what the messages say, wherever in a draft it stopped.
    checked = Conversation(dense, tokenizer, 512, draft_model=draft)
    plain = Conversation(dense, tokenizer, 512)
    assert interrupted_then_again(checked) == interrupted_then_again(plain)
    assert checked.messages == plain.messages


def test_lossless_can_be_switched_on_and_off(parts: Parts) -> None:
    dense, draft, tokenizer = parts
    expected = replies(Conversation(dense, tokenizer, 512), PROMPTS[:3])
    conversation = Conversation(dense, tokenizer, 512, draft_model=draft)
    answers = replies(conversation, PROMPTS[:1])
    conversation.switch(dense, rebuild_kv=False)
    answers += replies(conversation, PROMPTS[1:2])
    conversation.switch(dense, rebuild_kv=False, draft_model=draft)
    assert answers + replies(conversation, PROMPTS[2:3]) == expected


@pytest.mark.parametrize("kv_options", [KVCacheOptions(max_kv_size=64), KVCacheOptions(kv_bits=8)])
def test_lossless_refuses_kv_caches_that_cannot_go_back(
    parts: Parts, kv_options: KVCacheOptions
) -> None:
    dense, draft, tokenizer = parts
    with pytest.raises(UsageError, match="needs a KV cache that can go back"):
        Conversation(dense, tokenizer, 512, draft_model=draft, kv_options=kv_options)
