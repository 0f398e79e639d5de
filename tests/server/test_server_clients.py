"""Requests of ordinary clients: what Continue, Open WebUI, Cline, llm and LangChain send."""

import contextlib
import http.client
import json
import os
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import openai
import pytest
from hypothesis import HealthCheck, given, settings

Running = Any
Oracle = Callable[..., str]
MAIL = "write friendly e-mails to my aunt"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def post(
    running: Running, path: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=30)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    all_headers = {"Content-Type": "application/json", **(headers or {})}
    with contextlib.closing(connection):
        connection.request("POST", path, raw, all_headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def answered(running: Running, **changes: Any) -> str:
    body = {"model": "tiny:mail", "messages": HELLO, "max_tokens": 6, **changes}
    status, answer = post(running, CHAT, body)
    assert status == 200, answer
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 6.0},
        {"max_tokens": None, "max_completion_tokens": 6},
        {"top_k": -1},
        {"seed": -1},
        {"seed": None, "stop": None, "tools": None, "response_format": None},
        {"stop": [], "tools": [], "logit_bias": {}, "stream_options": {}},
        {"stop": "", "tool_choice": "none"},
        {"stop": ["", "zzzz", *(f"never {i}" for i in range(500))]},
        {"n": 1.0, "user": "me", "store": False, "metadata": {}, "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"unknown": [1, {"deep": None}], "options": {"num_ctx": 4096}, "top_p": 1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
        {"messages": [{"role": "user", "content": ["hel", "lo"], "name": "me"}]},
        {"logprobs": False, "top_logprobs": 0, "chat_template_kwargs": {"enable_thinking": False}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_forms_that_mean_the_same(
    running: Running, expected: Oracle, changes: dict[str, Any]
) -> None:
    assert answered(running, **changes) == expected(MAIL, "hello", 6)


@pytest.mark.parametrize("max_tokens", [-1, 10**9, 1e6])
def test_a_limit_beyond_the_context_is_what_fits(running: Running, max_tokens: Any) -> None:
    messages = [{"role": "user", "content": "x" * 440}]
    body = {"model": "tiny:mail", "messages": messages, "max_tokens": max_tokens}
    status, answer = post(running, CHAT, body)
    assert status == 200
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("content", [None, "", [], " \n"])
def test_content_may_be_empty(running: Running, content: Any) -> None:
    assert answered(running, messages=[{"role": "user", "content": content}])
    assert answered(running, messages=[*HELLO, {"role": "assistant", "content": content}, *HELLO])
    assert answered(running, messages=[{"role": "user"}])
    assert answered(running, messages=[{"role": "system", "content": "be brief"}])


def test_a_model_need_not_be_named(running: Running, expected: Oracle) -> None:
    for model in ("", None, "tiny"):
        status, answer = post(running, CHAT, {"model": model, "messages": HELLO, "max_tokens": 6})
        assert status == 200
        assert answer["choices"][0]["message"]["content"] == expected(None, "hello", 6)
        assert answer["model"] == "tiny"


def test_several_answers(running: Running, expected: Oracle) -> None:
    client = running.client()
    messages: Any = HELLO
    options: Any = {"model": "tiny:mail", "messages": messages, "max_tokens": 6, "n": 3}
    whole = client.chat.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {choice.message.content for choice in whole.choices} == {expected(MAIL, "hello", 6)}
    assert whole.usage.completion_tokens == 18
    drawn = client.chat.completions.create(**options, temperature=1.5, seed=3)
    again = client.chat.completions.create(**options, temperature=1.5, seed=3)
    texts = [choice.message.content for choice in drawn.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    streamed: dict[int, str] = {}
    reasons = []
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert set(streamed.values()) == {expected(MAIL, "hello", 6)}
    assert reasons == ["length"] * 3


def test_several_prompts(running: Running) -> None:
    client = running.client()
    both = client.completions.create(
        model="tiny:mail", prompt=["Dear aunt", "Dear uncle"], max_tokens=6, n=2, echo=True
    )
    alone = [
        client.completions.create(model="tiny:mail", prompt=prompt, max_tokens=6).choices[0].text
        for prompt in ("Dear aunt", "Dear uncle")
    ]
    texts = [choice.text for choice in both.choices]
    assert texts == [f"Dear aunt{alone[0]}"] * 2 + [f"Dear uncle{alone[1]}"] * 2


def chunked(raw: bytes, size: int = 7) -> bytes:
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    return b"".join(b"%x;ext=1\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def test_a_body_may_come_in_chunks(running: Running, expected: Oracle) -> None:
    body = json.dumps({"model": "tiny:mail", "messages": HELLO, "max_tokens": 6}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=30)
    with contextlib.closing(connection):
        for _ in range(2):  # the connection stays usable
            connection.putrequest("POST", CHAT)
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            connection.send(chunked(body))
            answer = json.loads(connection.getresponse().read())
            assert answer["choices"][0]["message"]["content"] == expected(MAIL, "hello", 6)


def test_routes_do_without_a_prefix(running: Running) -> None:
    body = {"messages": HELLO, "max_tokens": 2}
    assert post(running, "/chat/completions", body)[0] == 200
    assert post(running, "/v1/chat/completions/?x=1", body)[0] == 200


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/responses", "use /v1/chat/completions"),
        ("/v1/messages", "not Anthropic's"),
        ("/api/chat", "not Ollama's"),
        ("/v1/embeddings", "no embeddings here"),
    ],
)
def test_routes_of_other_servers_are_pointed_out(running: Running, path: str, says: str) -> None:
    status, answer = post(running, path, {})
    assert status == 404
    assert says in answer["error"]["message"]


def test_a_lowest_top_p_is_greedy(running: Running, expected: Oracle) -> None:
    assert answered(running, temperature=2, top_p=0) == expected(MAIL, "hello", 6)


def test_log_probabilities_of_chat(running: Running) -> None:
    client = running.client()
    messages: Any = HELLO
    options: Any = {
        "model": "tiny:mail", "messages": messages, "max_tokens": 5,
        "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0]
    tokens = whole.logprobs.content
    assert len(tokens) == 5
    assert (
        bytes(b for token in tokens for b in token.bytes).decode("utf-8", "replace")
        == whole.message.content
    )
    for token in tokens:
        assert token.logprob == max(other.logprob for other in token.top_logprobs) <= 0
        assert next(t.token for t in token.top_logprobs) == token.token
        assert len(token.top_logprobs) == 3
    streamed = [
        token
        for chunk in client.chat.completions.create(**options, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [t.token for t in streamed] == [t.token for t in tokens]
    plain = client.chat.completions.create(model="tiny:mail", messages=messages, max_tokens=2)
    assert plain.choices[0].logprobs is None


def test_log_probabilities_of_completions(running: Running) -> None:
    answer = running.client().completions.create(
        model="tiny:mail", prompt="Dear aunt", max_tokens=4, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    assert [len(each) for each in logprobs.top_logprobs] == [2] * 4


def test_a_bias_decides(running: Running) -> None:
    client = running.client()
    messages: Any = HELLO
    for token in (50, 60):
        answer = client.chat.completions.create(
            model="tiny:mail", messages=messages, max_tokens=4, logit_bias={str(token): 100},
            logprobs=True,
        )  # fmt: skip
        assert len(set(answer.choices[0].message.content or "")) == 1
    status, answer = post(
        running, CHAT, {"model": "tiny:mail", "messages": HELLO, "logit_bias": {"5": "much"}}
    )
    assert (status, answer["error"]["param"]) == (400, "5")


def test_an_error_of_the_template_is_the_clients(running: Running) -> None:
    kwargs = {"enable_thinking": "x" * 10}
    assert answered(running, chat_template_kwargs=kwargs)


NUM_BODIES = int(os.environ.get("IFP_TEST_BODIES", "150"))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FUNCTION = st.fixed_dictionaries({}, optional={"name": JSON, "parameters": JSON})
TOOLS = st.lists(
    st.fixed_dictionaries({"type": st.just("function")}, optional={"function": FUNCTION | JSON})
    | JSON,
    max_size=2,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool", "function"]) | JSON,
            "content": JSON
            | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": JSON})),
            "tool_calls": st.lists(
                st.fixed_dictionaries(
                    {"function": st.fixed_dictionaries({"name": JSON, "arguments": JSON})}
                )
                | JSON
            ),
        },
    ),
    max_size=3,
)
FIELDS: dict[str, Any] = {
    "model": st.sampled_from(["tiny", "tiny:mail", "tiny:dense", "gpt-4"]),
    "messages": st.just(HELLO) | MESSAGES | JSON,
    "prompt": st.just("hello") | JSON,
    "max_tokens": st.integers(-2, 5),
    "tools": TOOLS,
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema"])},
        optional={"json_schema": st.fixed_dictionaries({"schema": JSON})},
    ),
} | {
    name: JSON
    for name in (
        "stream", "stream_options", "n", "seed", "stop", "temperature", "top_p", "top_k", "min_p",
        "logprobs", "top_logprobs", "logit_bias", "repetition_penalty", "presence_penalty", "echo",
        "frequency_penalty", "task", "keep", "tool_choice", "chat_template_kwargs", "best_of",
        "parallel_tool_calls", "modalities", "suffix", "audio", "functions",
    )
}  # fmt: skip

FIXED = ("model", "messages", "max_tokens")


@settings(max_examples=NUM_BODIES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.fixed_dictionaries(
        {name: FIELDS[name] for name in FIXED},
        optional={name: strategy for name, strategy in FIELDS.items() if name not in FIXED},
    ),
    is_chat=st.booleans(),
)
def test_any_body_is_answered_or_refused(
    running: Running, body: dict[str, Any], is_chat: bool
) -> None:
    raw = json.dumps(body, allow_nan=True).encode()
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=30)
    with contextlib.closing(connection):
        path = CHAT if is_chat else "/v1/completions"
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    if response.status == 200:
        assert text.endswith("data: [DONE]\n\n") or json.loads(text)["choices"]
    else:
        assert response.status in (400, 404)
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]


def test_the_server_is_well_after_all_of_these(running: Running) -> None:
    assert running.server.num_requests == 0
    assert isinstance(running.client(), openai.OpenAI)
    assert answered(running)
