"""Conversations: the KV cache changes speed, never words; nothing is lost when stopped."""

import importlib
import string
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, cast

import mlx.nn as nn
import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_logits_processors

from ifp_mlx.chat.conversation import Conversation
from ifp_mlx.chat.sampling import KVCacheOptions, SamplingOptions
from ifp_mlx.errors import UsageError
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model

Opened = tuple[nn.Module, Any]
GREEDY = SamplingOptions(max_new_tokens=12)
PENALIZED = SamplingOptions(max_new_tokens=12, repetition_penalty=1.3)


@pytest.fixture
def opened(tiny_checkpoint: Callable[..., Path]) -> Opened:
    folder = tiny_checkpoint()
    return load_model(folder)[0], load_tokenizer(folder)


def start(opened: Opened, **options: Any) -> Conversation:
    return Conversation(opened[0], opened[1], 512, **options)


class Chat:
    """A conversation and what was said in it, as a caller keeps it."""

    def __init__(self, conversation: Conversation, *messages: dict[str, str]):
        self.conversation = conversation
        self.messages = list(messages)

    def ask(self, text: str, sampling: SamplingOptions) -> str:
        self.messages.append({"role": "user", "content": text})
        answer = "".join(self.conversation.reply(self.messages, sampling))
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def ask(conversation: Conversation, text: str, sampling: SamplingOptions) -> str:
    """The answer to one message that nothing was said before."""
    return Chat(conversation).ask(text, sampling)


def plain_reply(opened: Opened, messages: list[dict[str, str]], **options: Any) -> str:
    """What mlx-lm says to the whole conversation with an empty cache."""
    ids = opened[1].apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return "".join(r.text for r in stream_generate(*opened, ids, max_tokens=12, **options))


def test_each_turn_says_what_mlx_lm_says_to_the_whole_conversation(opened: Opened) -> None:
    chat = Chat(start(opened), {"role": "system", "content": "be brief"})
    for text in ("hello", "and then?", "bye"):
        messages = [*chat.messages, {"role": "user", "content": text}]
        assert chat.ask(text, GREEDY) == plain_reply(opened, messages)


def test_each_turn_is_penalized_as_the_whole_conversation_would_be(opened: Opened) -> None:
    chat = Chat(start(opened))
    for text in ("hello", "?", "bye"):
        messages = [*chat.messages, {"role": "user", "content": text}]
        penalized = plain_reply(
            opened, messages, logits_processors=make_logits_processors(repetition_penalty=1.3)
        )
        assert chat.ask(text, PENALIZED) == penalized
        assert penalized != plain_reply(opened, messages)


def test_a_strong_penalty_lets_no_token_come_again_among_the_last_20(opened: Opened) -> None:
    def least_distance_of_repeats(penalty: float | None) -> int:
        """Return how far apart the closest two equal tokens are, one of them in the reply."""
        conversation = start(opened)
        options = SamplingOptions(max_new_tokens=60, repetition_penalty=penalty)
        list(conversation.complete("hi", options))
        ids = conversation.kv_cache.token_ids
        assert len(ids) >= 60
        return min(j - i for j in range(2, len(ids)) for i in range(j) if ids[i] == ids[j])

    assert least_distance_of_repeats(None) <= 20
    assert least_distance_of_repeats(1e6) > 20


def test_the_penalty_reaches_into_what_the_kv_cache_holds(opened: Opened) -> None:
    options = SamplingOptions(max_new_tokens=6, repetition_penalty=1e6)
    for start_of_text in range(0, 82, 6):  # some of these texts hold what would be said to them
        text = string.printable[start_of_text : start_of_text + 18]
        anew = "".join(start(opened).complete(text, options))
        conversation = start(opened)
        for read_before, least_cached in ((text[:9], 9), (text, 17)):
            list(conversation.complete(read_before, options))
            assert "".join(conversation.complete(text, options)) == anew
            assert conversation.stats is not None
            assert conversation.stats.cached_prompt_tokens >= least_cached


def test_a_second_turn_prefills_only_what_is_new(opened: Opened) -> None:
    chat = Chat(start(opened))
    chat.ask("hello", GREEDY)
    first = chat.conversation.stats
    chat.ask("more", GREEDY)
    second = chat.conversation.stats
    assert first is not None
    assert second is not None
    assert first.cached_prompt_tokens == 0
    assert second.cached_prompt_tokens >= first.prompt_tokens


def test_stopping_keeps_what_was_read_and_written(opened: Opened) -> None:
    conversation = start(opened)
    question = {"role": "user", "content": "hello"}
    stream = cast(Generator[str, None, None], conversation.reply([question], GREEDY))
    partial = next(stream) + next(stream)
    stream.close()
    assert conversation.stats is not None
    assert conversation.stats.finish_reason == "interrupted"
    chat = Chat(conversation, question, {"role": "assistant", "content": partial})
    messages = [*chat.messages, {"role": "user", "content": "go on"}]
    assert chat.ask("go on", GREEDY) == plain_reply(opened, messages)
    assert conversation.stats.cached_prompt_tokens > 0


def test_a_reply_without_a_token_has_no_statistics(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(importlib.import_module("mlx_lm.generate"), "stream_generate", interrupted)
    conversation = start(opened)
    with pytest.raises(KeyboardInterrupt):
        ask(conversation, "hello", GREEDY)
    assert conversation.stats is None


def test_dropped_turns_leave_no_trace(opened: Opened) -> None:
    chat = Chat(start(opened))
    for text in ("one", "two", "three"):
        chat.ask(text, GREEDY)
    del chat.messages[-2:]
    del chat.messages[:2]
    messages = [*chat.messages, {"role": "user", "content": "four"}]
    assert chat.ask("four", GREEDY) == plain_reply(opened, messages)


def test_switching_models_goes_on_from_what_was_read(
    opened: Opened, tiny_model: Callable[..., nn.Module]
) -> None:
    other = tiny_model("llama", vocab_size=264, rope_theta=500.0)
    chat = Chat(start(opened))
    chat.ask("hello", GREEDY)
    read = len(chat.conversation.kv_cache.token_ids)
    chat.conversation.switch(other)
    answer = chat.ask("more", GREEDY)
    assert chat.conversation.stats is not None
    assert chat.conversation.stats.cached_prompt_tokens >= read - 1
    anew = Conversation(other, opened[1], 512)
    first = anew.reply(chat.messages[:-1], GREEDY)
    assert answer != "".join(first)  # keys and values of the former model are in use


def test_one_seed_draws_the_same_words(opened: Opened) -> None:
    def draw(seed: int) -> str:
        options = SamplingOptions(max_new_tokens=20, temperature=1.0, seed=seed)
        return ask(start(opened), "hello", options)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_greedy_ignores_the_seed(opened: Opened) -> None:
    first = ask(start(opened), "hi", SamplingOptions(max_new_tokens=9, seed=1))
    second = ask(start(opened), "hi", SamplingOptions(max_new_tokens=9, seed=2))
    assert first == second


def test_generation_stops_at_an_end_token(opened: Opened) -> None:
    model, tokenizer = opened
    first, second = (
        response.token
        for response in stream_generate(model, tokenizer, tokenizer.encode("a"), max_tokens=2)
    )
    assert first != second
    tokenizer.eos_token_ids = {second}
    conversation = start(opened)
    list(conversation.complete("a", SamplingOptions(max_new_tokens=50)))
    assert conversation.stats is not None
    assert conversation.stats.finish_reason == "stop"
    assert conversation.stats.generated_tokens == 2


def test_the_reply_ends_where_the_context_does(opened: Opened) -> None:
    conversation = Conversation(opened[0], opened[1], 60)
    ask(conversation, "hello", SamplingOptions(max_new_tokens=500))
    assert conversation.stats is not None
    assert conversation.stats.prompt_tokens + conversation.stats.generated_tokens <= 60


def test_a_prompt_beyond_the_context_is_refused(opened: Opened) -> None:
    with pytest.raises(UsageError, match=r"the prompt has \d+ tokens, the model's context 512"):
        ask(start(opened), "x" * 600, GREEDY)


def test_a_rotating_cache_takes_more_than_the_context(opened: Opened) -> None:
    conversation = start(opened, kv_options=KVCacheOptions(max_kv_size=64))
    assert ask(conversation, "x" * 600, GREEDY)
    assert ask(conversation, "again", GREEDY)


def test_a_quantized_kv_cache_answers(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(hidden_size=128)
    wide = load_model(folder)[0], load_tokenizer(folder)
    options = KVCacheOptions(kv_bits=8, kv_group_size=32)
    assert ask(start(wide, kv_options=options), "hello", GREEDY)


def test_a_kv_group_that_does_not_divide_the_heads_is_refused(opened: Opened) -> None:
    options = KVCacheOptions(kv_bits=8, kv_group_size=32)
    with pytest.raises(UsageError, match="`kv_bits` needs heads of a multiple of 32"):
        start(opened, kv_options=options)


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_prompt_is_refused(opened: Opened, text: str) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        ask(start(opened), text, GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"temperature": -1.0}, "`temperature` must be 0 or more"),
        ({"top_p": 1.5}, "`top_p` must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be a number above 0, not 0"),
        ({"repetition_penalty": -1.5}, "`repetition_penalty` must be a number above 0, not -1.5"),
        ({"repetition_penalty": float("nan")}, "must be a number above 0, not nan"),
        ({"repetition_penalty": float("inf")}, "must be a number above 0, not inf"),
    ],
)
def test_sampling_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingOptions(**options)
