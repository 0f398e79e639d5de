"""The server through OpenAI's own client: answers, streams, tasks, limits."""

import concurrent.futures
import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from mlx_lm.generate import TextStateMachine
from mlx_lm.server import GenerationContext, Response

from ifp_mlx.server.access import Access
from ifp_mlx.server.http import Limits
from ifp_mlx.server.replies import Answers, ChatReader, Reply

MACHINE = TextStateMachine({"normal": []})
NO_LOGPROBS: Any = ()  # as mlx-lm passes it where none are asked for

Running = Any  # the classes of conftest.py cannot be imported
Serve = Callable[..., contextlib.AbstractContextManager[Running]]
Oracle = Callable[..., str]
PYTHON = "help me write Python"
MAIL = "write friendly e-mails to my aunt"


def chat(client: openai.OpenAI, model: str, text: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, **options)


def joined(chunks: Any) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_two_tasks_stream_in_one_process(running: Running, expected: Oracle) -> None:
    client = running.client()
    answers, fingerprints = {}, set()
    for name, task in (("python-helper", PYTHON), ("mail", MAIL)):
        chunks = list(chat(client, f"tiny:{name}", "good morning", stream=True))
        answers[name] = joined(chunks)
        fingerprints |= {chunk.system_fingerprint for chunk in chunks}
        assert answers[name] == expected(task, "good morning")
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [
            "length"
        ]
    assert answers["python-helper"] != answers["mail"]
    assert len(fingerprints) == 2


@pytest.mark.parametrize("model", ["tiny", "tiny:mail", "tiny:dense"])
def test_streaming_equals_non_streaming(running: Running, model: str) -> None:
    client = running.client()
    whole = chat(client, model, "what is new?", max_tokens=24)
    streamed = joined(chat(client, model, "what is new?", max_tokens=24, stream=True))
    assert whole.choices[0].message.content == streamed
    assert whole.object == "chat.completion"


def test_completions_stream_as_they_answer(running: Running) -> None:
    client = running.client()
    whole = client.completions.create(model="tiny:mail", prompt="Dear aunt", max_tokens=20)
    chunks = client.completions.create(
        model="tiny:mail", prompt="Dear aunt", max_tokens=20, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.object == "text_completion"
    assert whole.usage.prompt_tokens == len("Dear aunt")


def test_the_dense_model_has_a_name(running: Running, expected: Oracle) -> None:
    answer = chat(running.client(), "tiny:dense", "good morning")
    assert answer.choices[0].message.content == expected(None, "good morning")


def test_a_request_may_carry_a_task(running: Running) -> None:
    client = running.client()
    named = chat(client, "tiny:mail", "hello")
    free = chat(client, "tiny", "hello", extra_body={"task": MAIL})
    other = chat(client, "tiny", "hello", extra_body={"task": "translate to Latin"})
    assert free.system_fingerprint == named.system_fingerprint
    assert free.choices[0].message.content == named.choices[0].message.content
    assert other.system_fingerprint != named.system_fingerprint


def test_the_bare_name_is_the_whole_model_for_every_conversation(running: Running) -> None:
    client = running.client()
    fingerprints = {
        chat(client, name, text).system_fingerprint
        for name in ("tiny", "tiny:dense", "")
        for text in ("tell me of ships", "and of harbours")
    }
    assert len(fingerprints) == 1


def test_the_bare_name_may_stand_for_one_task(serve: Serve, engine: Any, expected: Oracle) -> None:
    with serve(engine, default_task="mail") as running:
        answer = chat(running.client(), "tiny", "good morning")
        assert answer.choices[0].message.content == expected(MAIL, "good morning")


def test_a_system_message_may_be_the_task(serve: Serve, engine: Any, running: Running) -> None:
    messages: Any = [{"role": "system", "content": MAIL}, {"role": "user", "content": "hello"}]
    named = chat(running.client(), "tiny:mail", "hello")
    with serve(engine, task_from_system=True) as asked:
        client = asked.client()
        answer = client.chat.completions.create(model="tiny", messages=messages)
        assert answer.system_fingerprint == named.system_fingerprint
        named_task = client.chat.completions.create(model="tiny:python-helper", messages=messages)
        assert named_task.system_fingerprint != named.system_fingerprint
    ignored = running.client().chat.completions.create(model="tiny", messages=messages)
    assert ignored.system_fingerprint != named.system_fingerprint


def test_a_request_may_say_how_much_to_keep(running: Running) -> None:
    client = running.client()
    fingerprints = [
        chat(client, "tiny:mail", "hello", extra_body=extra).system_fingerprint
        for extra in ({}, {"keep": 1 / 3}, {"keep": 2 / 3}, {"keep": 1})
    ]
    dense = chat(client, "tiny:dense", "hello").system_fingerprint
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert fingerprints[3] == dense
    with pytest.raises(openai.BadRequestError, match="keep needs a task"):
        chat(client, "tiny", "hello", extra_body={"keep": 0.5})


def test_the_next_turn_goes_on_from_the_last(running: Running) -> None:
    client = running.client()
    first = chat(client, "tiny", "tell me of ships")
    messages: Any = [
        {"role": "user", "content": "tell me of ships"},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "and of harbours"},
    ]
    second = client.chat.completions.create(model="tiny", messages=messages)
    assert second.usage.prompt_tokens_details.cached_tokens > 0


def test_what_is_cached_does_not_change_the_answer(running: Running, expected: Oracle) -> None:
    client = running.client()
    text = "a question that comes twice"
    first, second = (chat(client, "tiny:mail", text) for _ in range(2))
    assert second.usage.prompt_tokens_details.cached_tokens > 0
    assert {a.choices[0].message.content for a in (first, second)} == {expected(MAIL, text)}


def test_token_counts_are_the_last_chunk(running: Running) -> None:
    client = running.client()
    whole = chat(client, "tiny:mail", "count me", max_tokens=9)
    *chunks, last = chat(
        client, "tiny:mail", "count me", max_tokens=9, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 9
    assert last.usage.total_tokens == last.usage.prompt_tokens + 9
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stop_string_ends_the_answer_before_it(running: Running, expected: Oracle) -> None:
    whole = expected(MAIL, "stop here", 40)
    stop = whole[11:14]
    answer = chat(running.client(), "tiny:mail", "stop here", max_tokens=40, stop=[stop, "zzzz"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40


def test_a_repetition_penalty_is_that_of_ifp_generate(running: Running, expected: Oracle) -> None:
    text = "say it again and again"
    wanted = expected(MAIL, text, repetition_penalty=1.3)
    for _ in range(2):  # the second time from the KV cache
        answer = chat(running.client(), "tiny:mail", text, extra_body={"repetition_penalty": 1.3})
        assert answer.choices[0].message.content == wanted
    assert answer.usage.prompt_tokens_details.cached_tokens > 0
    assert wanted != expected(MAIL, text)


def test_a_seed_repeats_an_answer(running: Running) -> None:
    client = running.client()
    draws = [
        chat(client, "tiny:mail", "draw", temperature=1.5, seed=seed).choices[0].message.content
        for seed in (5, 5, 6)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_system_and_developer_messages_are_one(running: Running) -> None:
    client = running.client()
    answers = []
    for role in ("system", "developer"):
        messages: Any = [{"role": role, "content": "be brief"}, {"role": "user", "content": "hi"}]
        answer = client.chat.completions.create(model="tiny:mail", messages=messages)
        answers.append(answer.choices[0].message.content)
    assert answers[0] == answers[1] != chat(client, "tiny:mail", "hi").choices[0].message.content


def test_content_may_come_in_parts(running: Running, expected: Oracle) -> None:
    parts: Any = [{"type": "text", "text": "good "}, {"type": "text", "text": "morning"}]
    answer = chat(running.client(), "tiny:mail", parts)
    assert answer.choices[0].message.content == expected(MAIL, "good morning")


def test_models_are_listed_and_described(running: Running) -> None:
    client = running.client()
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny:python-helper", "tiny:mail", "tiny:dense"]
    assert client.models.retrieve("tiny:mail").id == "tiny:mail"
    with pytest.raises(openai.NotFoundError, match="no model 'tiny:law' here"):
        client.models.retrieve("tiny:law")


def test_concurrent_clients_get_their_own_answers(running: Running, expected: Oracle) -> None:
    tasks = {"python-helper": PYTHON, "mail": MAIL}
    asked = [
        (name, f"client {client} asks for number {client * 7 + turn * turn}", turn % 2 == 0)
        for client in range(8)
        for turn, name in enumerate(("python-helper", "mail", "python-helper"))
    ]

    def ask(item: tuple[str, str, bool]) -> str:
        name, text, streamed = item
        answer = chat(running.client(), f"tiny:{name}", text, stream=streamed)
        return joined(answer) if streamed else answer.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, asked))
    assert answers == [expected(tasks[name], text) for name, text, _ in asked]


def test_one_request_too_many_is_told_to_come_back(engine: Any, serve: Serve) -> None:
    with serve(engine, Limits(max_requests=1)) as running:
        client = running.client()
        stream = chat(client, "tiny:mail", "a long one", max_tokens=400, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="1 requests are in work") as caught:
            chat(client, "tiny:mail", "me too")
        assert caught.value.response.headers["Retry-After"] == "1"
        stream.close()


def scripted_engine(*events: Any) -> Any:
    """Return an engine that says the same few things to everyone, then nothing more."""

    def start(*_: object) -> Answers:
        reader = ChatReader(TextStateMachine({"normal": []}))
        answers = Answers([Reply(reader, (), lambda: "ifp_scripted")])
        for event in events:
            answers.replies[0].put(event)
        return answers

    return SimpleNamespace(is_healthy=True, start=start, gauges=dict)


def context() -> GenerationContext:
    return GenerationContext(False, False, lambda *_: {}, MACHINE, "normal", [1, 2, 3], 0)


def word(text: str) -> Response:
    return Response(text, 7, 0.0, None, NO_LOGPROBS)


def test_a_request_without_its_turn_is_told_to_come_back(serve: Serve) -> None:
    with serve(scripted_engine(), Limits(time_limit_s=0.1)) as running:
        with pytest.raises(openai.InternalServerError, match="never had its turn") as caught:
            chat(running.client(), "tiny:mail", "hi")
        assert caught.value.status_code == 503
        assert caught.value.response.headers["Retry-After"] == "5"


def test_an_answer_that_takes_too_long_is_cut_off(serve: Serve) -> None:
    limits = Limits(time_limit_s=0.3)
    with serve(scripted_engine(context(), word("so")), limits) as running:
        client = running.client()
        with pytest.raises(openai.InternalServerError, match=r"more than 0\.3 s") as caught:
            chat(client, "tiny:mail", "hi")
        assert caught.value.status_code == 504
        stream = chat(client, "tiny:mail", "hi", stream=True)
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "so"]
        with pytest.raises(openai.APIError, match=r"more than 0\.3 s"):
            next(stream)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_frees_its_place(
    running: Running, serve: Serve, engine: Any, streamed: bool
) -> None:
    with serve(engine, Limits(max_requests=1)) as running:
        message = {"role": "user", "content": f"a long story {streamed}"}
        body = {"model": "tiny:mail", "messages": [message], "max_tokens": 450, "stream": streamed}
        connection = http.client.HTTPConnection("127.0.0.1", running.server.port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        while running.server.num_requests == 0:
            time.sleep(0.01)
        if streamed:
            connection.getresponse().read(10)
        connection.sock.shutdown(socket.SHUT_RDWR) if connection.sock else None
        connection.close()
        deadline = time.monotonic() + 10
        while running.server.num_requests and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.server.num_requests == 0
        assert running.line_with("client left")
        assert chat(running.client(), "tiny:mail", "next, please", max_tokens=2)


def test_a_key_is_asked_for(engine: Any, serve: Serve) -> None:
    with serve(engine, access=Access("sesame")) as running:
        assert chat(running.client("sesame"), "tiny:mail", "hi", max_tokens=2)
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            chat(running.client("Sesame"), "tiny:mail", "hi")
        with pytest.raises(openai.AuthenticationError):
            running.client("sesam").models.list()
        connection = http.client.HTTPConnection("127.0.0.1", running.server.port)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()


def test_draining_finishes_what_is_in_work_and_refuses_the_rest(engine: Any, serve: Serve) -> None:
    with serve(engine) as running, concurrent.futures.ThreadPoolExecutor(2) as pool:
        client = running.client()
        answer = pool.submit(chat, client, "tiny:mail", "the last words", max_tokens=200)
        while running.server.num_requests == 0:
            time.sleep(0.01)
        drained = pool.submit(running.server.drain, 20)
        while not running.server.is_draining:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="stopping") as caught:
            chat(client, "tiny:mail", "too late")
        assert caught.value.status_code == 503
        assert answer.result().usage.completion_tokens == 200
        assert drained.result()


def broken_engine(*, is_healthy: bool) -> Any:
    def start(*_: object) -> None:
        raise RuntimeError("secret detail")

    return SimpleNamespace(is_healthy=is_healthy, start=start, gauges=dict)


def test_a_bug_of_ours_is_one_line_for_the_client(serve: Serve) -> None:
    with serve(broken_engine(is_healthy=True)) as running:
        with pytest.raises(openai.InternalServerError) as caught:
            chat(running.client(), "tiny:mail", "hi")
        assert caught.value.body["message"] == "internal error; the server's log says more"  # type: ignore[index]
        assert running.line_with("RuntimeError: secret detail")


def test_a_dead_generation_thread_is_said(serve: Serve) -> None:
    with serve(broken_engine(is_healthy=False)) as running:
        with pytest.raises(openai.InternalServerError, match="generation thread has died"):
            chat(running.client(), "tiny:mail", "hi")
        connection = http.client.HTTPConnection("127.0.0.1", running.server.port)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503
        connection.close()
