"""The server's parts alone: stop strings, replies, names, the order of requests."""

import itertools
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import mlx.core as mx
import pytest
from hypothesis import given
from mlx_lm.generate import TextStateMachine
from mlx_lm.models.cache import KVCache
from mlx_lm.server import GenerationContext, Response

from ifp_mlx.assistant import Assistant
from ifp_mlx.errors import ResourceError, UsageError
from ifp_mlx.server.api_error import APIError
from ifp_mlx.server.catalog import ModelCatalog, SubnetRequest
from ifp_mlx.server.engine import Engine
from ifp_mlx.server.generator import RequestQueue
from ifp_mlx.server.http import Limits
from ifp_mlx.server.kv_caches import KVCaches
from ifp_mlx.server.replies import Answers, ChatReader, Piece, Reply
from ifp_mlx.server.requests import (
    GenerationRequest,
    RequestDefaults,
    parse_completion_request,
)
from ifp_mlx.server.stop_strings import StopStrings
from ifp_mlx.server.subnet_provider import EngineOptions, Prepared
from ifp_mlx.slicing.compact import CutOptions
from ifp_mlx.subnets.memory import checkpoint_sizes

BATCHED = EngineOptions()
MACHINE = TextStateMachine({"normal": []})
NO_LOGPROBS: Any = ()  # as mlx-lm passes it where none are asked for


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_strings_do_not_depend_on_where_the_text_was_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    machine, kept, stopped = StopStrings(tuple(stops)), "", False
    for piece in pieces:
        emitted, stopped = machine.feed(piece)
        kept += emitted
        if stopped:
            break
    else:
        kept += machine.flush()
    # Oracle: read letter by letter until one of them, the longest if several, is complete.
    ends = (end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stops))
    end = next(ends, None)
    assert stopped == (end is not None)
    cut = 0 if end is None else max(len(s) for s in stops if text[:end].endswith(s))
    assert kept == text[:end][: len(text[:end]) - cut]


def context() -> GenerationContext:
    return GenerationContext(False, False, lambda *_: {}, MACHINE, "normal", [1, 2, 3], 2)


def reply_with(
    *events: Any, stop: tuple[str, ...] = (), transitions: dict[str, Any] | None = None
) -> Reply:
    reader = ChatReader(TextStateMachine(transitions or {"normal": []}))
    reply = Reply(reader, stop, lambda: "ifp_x")
    for event in events:
        reply.put(event)
    return reply


def texts(reply: Reply) -> list[Any]:
    events = []
    while not reply.events.empty():
        events.append(reply.events.get()[1])
    answers = Answers([reply])
    for event in events:
        reply.put(event)
    return [piece for _, piece in answers.pieces(5, lambda: None)]


def test_a_reply_ends_with_its_reason() -> None:
    end = Response("!", 2, 0.0, "stop", NO_LOGPROBS)
    reply = reply_with(context(), Response("a", 1, 0.0, None, NO_LOGPROBS), end, None)
    assert [piece.text for piece in texts(reply)] == ["a", "!"]
    assert (reply.finish_reason, reply.prompt_tokens, reply.cached_tokens) == ("stop", 3, 2)
    assert reply.completion_tokens == 2
    assert reply.fingerprint == "ifp_x"


def test_text_held_back_for_a_stop_string_is_given_in_the_end() -> None:
    end = Response("<", 2, 0.0, "length", NO_LOGPROBS)
    reply = reply_with(context(), end, stop=("<end>",))
    assert "".join(piece.text for piece in texts(reply)) == "<"


def test_a_stop_string_tells_the_generation_to_end() -> None:
    begun = context()
    reply = reply_with(begun, Response("one two", 1, 0.0, None, NO_LOGPROBS), stop=("two",))
    assert "".join(piece.text for piece in texts(reply)) == "one "
    assert reply.finish_reason == "stop"
    assert begun._should_stop


def test_what_the_model_thinks_is_kept_apart() -> None:
    thinking = {
        "normal": [("<think>", "reasoning")],
        "reasoning": [("</think>", "normal")],
    }
    end = Response("<think>hm</think>so", 1, 0.0, "length", NO_LOGPROBS)
    pieces = texts(reply_with(context(), end, transitions=thinking))
    assert pieces == [Piece("hm", is_reasoning=True), Piece("so", is_reasoning=False)]


def test_an_abandoned_request_is_stopped_when_it_begins() -> None:
    reply, begun = reply_with(), context()
    reply.abandon()
    reply.put(begun)
    assert begun._should_stop


def test_an_error_of_the_generation_thread_reaches_the_client() -> None:
    with pytest.raises(UsageError, match="too long"):
        texts(reply_with(UsageError("too long")))


def kv_cache(keys: mx.array) -> KVCache:
    cache = KVCache()
    cache.keys = cache.values = keys
    cache.offset = keys.shape[2]
    return cache


def test_kv_caches_leave_a_token_to_compute() -> None:
    caches = KVCaches(max_size=4)
    caches.insert_cache(b"units", [1, 2, 3], [kv_cache(mx.zeros((1, 2, 3, 4)))])
    assert caches.fetch_nearest_cache(b"units", [1, 2, 3])[1] != []
    assert caches.fetch_nearest_cache(b"units", [1, 2, 3, 4])[1] == [4]
    assert caches.fetch_nearest_cache(b"other", [1, 2, 3])[1] == [1, 2, 3]


def test_kv_caches_do_not_hold_the_batch_that_they_come_from() -> None:
    caches = KVCaches(max_size=4)
    before_bytes = mx.get_active_memory()
    batch = mx.ones((64, 2, 64, 64))  # 2 MB
    mx.eval(batch)
    caches.insert_cache(b"units", [1, 2, 3], [kv_cache(mx.contiguous(batch[:1, :, :3]))])
    del batch
    assert mx.get_active_memory() - before_bytes < 10_000


def long_request(**changes: Any) -> GenerationRequest:
    body = {"model": "tiny", "prompt": "a long story", "max_tokens": 450, **changes}
    return parse_completion_request(body, RequestDefaults(16, 0.0))


def test_stopping_the_engine_cuts_answers_off(checkpoint_folder: Path) -> None:
    engine = Engine(lambda: (Assistant.load(checkpoint_folder), lambda task: 64), EngineOptions())
    try:
        answers = engine.start(long_request(seed=3), SubnetRequest("dense"))
        pieces = answers.pieces(60, lambda: None)
        next(pieces)
    finally:
        engine.stop()
    assert not engine.is_healthy
    with pytest.raises(APIError, match="cut off"):
        list(pieces)
    assert answers.replies[0].completion_tokens < 450


def test_the_first_request_can_share_a_batch(engine: Engine) -> None:
    assert engine._provider.is_batchable


def test_an_engine_that_cannot_be_prepared_says_why() -> None:
    def prepare() -> Prepared:
        raise UsageError("no such model")

    with pytest.raises(UsageError, match="no such model"):
        Engine(prepare, EngineOptions())


def test_requests_for_one_sub_network_are_taken_together() -> None:
    requests = RequestQueue(SimpleNamespace())  # type: ignore[arg-type]
    for name in ("a1", "b1", "a2", "b2", "c1", "a3"):
        requests.put((None, name, SimpleNamespace(model=name[0])))
    order = [requests.get_nowait()[1] for _ in range(6)]
    assert order == ["a1", "a2", "a3", "b1", "b2", "c1"]
    with pytest.raises(queue.Empty):
        requests.get_nowait()


@pytest.mark.parametrize("name", ["dense", "", "a b", "a:b", "-x"])
def test_tasks_need_usable_names(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a task"):
        ModelCatalog("tiny", {name: "write"})


def test_tasks_need_descriptions() -> None:
    with pytest.raises(UsageError, match="write mail=WHAT IT IS FOR"):
        ModelCatalog("tiny", {"mail": " "})


def test_limits_are_positive() -> None:
    with pytest.raises(UsageError, match="must be above 0"):
        Limits(max_requests=0)


def test_a_model_that_does_not_fit_is_served_by_its_sub_network(checkpoint_folder: Path) -> None:
    sizes = checkpoint_sizes(checkpoint_folder)
    room = sizes.predict(64, 256).total_bytes
    assert room < sizes.predict(sizes.amounts.num_units, 256).total_bytes
    options = CutOptions(context_tokens=256, memory_bytes=room)
    engine = Engine(
        lambda: (Assistant.load(checkpoint_folder, options=options), lambda task: 64), BATCHED
    )
    try:
        assert engine._provider.is_batchable
        reply = engine.start(long_request(seed=3), SubnetRequest("task", "help me write Python"))
        assert list(reply.pieces(60, lambda: None))
        with pytest.raises(ResourceError, match="192 of 192 FFN units need"):
            list(
                engine.start(long_request(seed=3), SubnetRequest("dense")).pieces(60, lambda: None)
            )
    finally:
        engine.stop()


def test_whatever_goes_wrong_on_the_way_to_serving_is_raised(
    checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such cache")

    monkeypatch.setattr("ifp_mlx.server.subnet_provider.make_prompt_cache", broken)
    with pytest.raises(ValueError, match="no such cache"):
        Engine(lambda: (Assistant.load(checkpoint_folder), lambda task: 64), BATCHED)
