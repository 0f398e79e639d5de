"""Long prompts are read in pieces: watched, stopped, and answered as if read at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import stream_generate

from ifp_mlx.chat import prompt_reading
from ifp_mlx.chat.conversation import Conversation
from ifp_mlx.chat.kv_cache import KVCache
from ifp_mlx.chat.prompt_reading import read_ahead
from ifp_mlx.chat.reading import ReadsWithPart
from ifp_mlx.chat.sampling import KVCacheOptions, SamplingOptions
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model

GREEDY = SamplingOptions(max_new_tokens=8)
TEXT = "".join(chr(97 + (7 * position + position // 11) % 26) for position in range(700))
IDS = [(7 * position) % 61 + 1 for position in range(700)]


@pytest.fixture
def opened(tiny_checkpoint: Callable[..., Path]) -> tuple[nn.Module, Any]:
    folder = tiny_checkpoint(max_position_embeddings=2048)
    return load_model(folder)[0], load_tokenizer(folder)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces as short as they may be, however fast this machine is."""
    monkeypatch.setattr(prompt_reading, "_PIECE_S", 0.0)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("options", [KVCacheOptions(), KVCacheOptions(max_kv_size=300)])
def test_a_long_prompt_is_answered_as_if_read_at_once(
    opened: tuple[nn.Module, Any], options: KVCacheOptions
) -> None:
    conversation = Conversation(*opened, 2048, kv_options=options)
    seen: list[tuple[int, int]] = []
    answer = "".join(conversation.complete(TEXT, GREEDY, lambda *read: seen.append(read)))
    ids = opened[1].encode(TEXT)
    expected = stream_generate(*opened, ids, max_tokens=8, max_kv_size=options.max_kv_size)
    assert answer == "".join(response.text for response in expected)
    total = len(ids)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert (seen[0], seen[-1]) == ((0, total), (total, total))
    assert len(seen) > 3
    assert conversation.stats is not None
    assert conversation.stats.cached_prompt_tokens == 0


@pytest.mark.usefixtures("small_pieces")
def test_stopping_while_reading_keeps_what_was_read(opened: tuple[nn.Module, Any]) -> None:
    class Stop(Exception):
        pass

    read = 0

    def stop_at_the_second_piece(done: int, total: int) -> None:
        nonlocal read
        if 0 < read < done:
            raise Stop
        read = done

    conversation = Conversation(*opened, 2048)
    with pytest.raises(Stop):
        list(conversation.complete(TEXT, GREEDY, stop_at_the_second_piece))
    assert conversation.stats is None
    kept = len(conversation.kv_cache.token_ids)
    assert read < kept < len(TEXT)

    answer = "".join(conversation.complete(TEXT, GREEDY))
    assert conversation.stats is not None
    assert conversation.stats.cached_prompt_tokens == kept
    assert answer == "".join(Conversation(*opened, 2048).complete(TEXT, GREEDY))


def test_pieces_are_as_long_as_half_a_second_reads(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_s = 0.0
    model = tiny_model("llama")

    class Slow(nn.Module):
        def __call__(self, ids: mx.array, cache: Any) -> mx.array:
            nonlocal clock_s
            clock_s += 0.0014 * ids.shape[1]  # 357 tokens in half a second
            logits: mx.array = model(ids, cache=cache)
            return logits

    monkeypatch.setattr("ifp_mlx.chat.prompt_reading.time.perf_counter", lambda: clock_s)
    cache = KVCache.empty(model, KVCacheOptions())
    seen = []
    read_ahead(Slow(), IDS, cache, KVCacheOptions(), lambda done, total: seen.append(done))
    assert seen == [0, 32, 288, 544]  # 32 to learn the speed, then 256; mlx-lm reads the rest


def test_a_short_prompt_is_left_to_mlx_lm(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama")
    cache = KVCache.empty(model, KVCacheOptions())
    assert read_ahead(model, IDS[:64], cache, KVCacheOptions(), lambda *read: None) == 0
    assert cache.layers[0].offset == 0


def test_a_part_that_reads_leaves_the_tail_to_the_whole(
    tiny_model: Callable[..., nn.Module],
) -> None:
    whole = tiny_model("llama")
    asked: list[int] = []

    class Watched(nn.Module):
        def __call__(self, ids: mx.array, cache: Any) -> mx.array:
            asked.append(ids.shape[1])
            logits: mx.array = whole(ids, cache=cache)
            return logits

    model = ReadsWithPart(Watched(), whole, tail_tokens=50)
    cache = KVCache.empty(whole, KVCacheOptions())
    num_read = read_ahead(model, IDS, cache, KVCacheOptions(), lambda *read: None)
    assert not asked
    assert 0 < num_read <= len(IDS) - 51
    assert cache.layers[0].offset == num_read


def test_of_a_long_prompt_a_part_reads_all_but_the_last_token(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifp_mlx.chat.reading.LONGEST_WITH_TAIL", len(IDS) - 1)
    whole = tiny_model("llama")
    cache = KVCache.empty(whole, KVCacheOptions())
    model = ReadsWithPart(whole, whole, tail_tokens=50)
    num_read = read_ahead(model, IDS, cache, KVCacheOptions(), lambda *read: None)
    assert num_read == len(IDS) - 1 == cache.layers[0].offset
