"""Bad requests: each gets a 4xx in OpenAI's shape, and the server goes on."""

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ifp_mlx.server.access import Access
from ifp_mlx.server.http import Limits

Running = Any
JSON_TYPE = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
CHAT_BODY = {"model": "tiny:mail", "messages": HELLO, "max_tokens": 2}
TEXT_BODY = {"model": "tiny:mail", "prompt": "hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def guarded(
    engine: Any, serve: Callable[..., contextlib.AbstractContextManager[Running]]
) -> Iterator[Running]:
    with serve(engine, Limits(max_body_bytes=20_000), Access("sesame")) as running:
        yield running


def send(
    running: Running, method: str, path: str, raw: bytes | None, headers: dict[str, str]
) -> tuple[int, dict[str, str], dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=20)
    try:
        connection.putrequest(method, path)
        for name, value in {"Authorization": "Bearer sesame", **headers}.items():
            connection.putheader(name, value)
        connection.endheaders(raw)
        response = connection.getresponse()
        return response.status, dict(response.headers), json.loads(response.read())
    finally:
        connection.close()


def post(
    running: Running, path: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], dict[str, Any]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    all_headers = {**JSON_TYPE, "Content-Length": str(len(raw)), **(headers or {})}
    return send(running, "POST", path, raw, all_headers)


def check_error(answer: tuple[int, dict[str, str], dict[str, Any]], status: int, says: str) -> None:
    error = answer[2]["error"]
    assert answer[0] == status
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]


def chat_with(**changes: Any) -> dict[str, Any]:
    return {**CHAT_BODY, **changes}


def message(**changes: Any) -> dict[str, Any]:
    return chat_with(messages=[{"role": "user", "content": "hello", **changes}])


BAD_FIELDS: list[tuple[dict[str, Any], str | None, str]] = [
    (chat_with(model=7), "model", "model must be a string"),
    ({"model": "tiny"}, "messages", "messages is missing"),
    (chat_with(messages=[]), "messages", "a list with at least one message"),
    (chat_with(messages="hello"), "messages", "a list with at least one message"),
    (chat_with(messages=["hello"]), "messages[0]", "an object with role and content"),
    (message(role="wizard"), "messages[0].role", "one of system, developer, user"),
    (message(role=None), "messages[0].role", "one of system, developer, user"),
    (message(role=["user"]), "messages[0].role", "one of system, developer, user"),
    (message(content=5), "messages[0].content", "must be a string"),
    (message(content=[{"type": "image_url"}]), "messages[0].content", "'text' only"),
    (message(content=[{"type": "text", "text": 5}]), "messages[0].content", "with a text"),
    (message(content="half \ud83d"), "messages[0].content", "half a surrogate pair"),
    (message(role="assistant", tool_calls=[{}]), "messages[0].tool_calls[0]", "an object with id"),
    (chat_with(n=17), "n", "an integer from 1 to 16"),
    (chat_with(n=0), "n", "an integer from 1 to 16"),
    (chat_with(temperature=2.5), "temperature", "a number from 0 to 2"),
    (chat_with(temperature=-1), "temperature", "a number from 0 to 2"),
    (chat_with(temperature="hot"), "temperature", "a number from 0 to 2"),
    (chat_with(temperature=1e999), "temperature", "a number from 0 to 2"),
    (chat_with(top_p=1.5), "top_p", "a number from 0 to 1"),
    (chat_with(top_p=True), "top_p", "a number from 0 to 1"),
    (chat_with(min_p=-0.1), "min_p", "a number from 0 to 1"),
    (chat_with(top_k=1.5), "top_k", "an integer from -1"),
    (chat_with(presence_penalty=3), "presence_penalty", "a number from -2 to 2"),
    (chat_with(max_tokens=0), "max_tokens", "at least 1, or -1 for as many as fit"),
    (chat_with(max_tokens=-3), "max_tokens", "an integer from -1"),
    (chat_with(max_tokens=8.5), "max_tokens", "an integer from -1"),
    (chat_with(max_tokens="9"), "max_tokens", "an integer from -1"),
    (chat_with(max_completion_tokens=0), "max_completion_tokens", "at least 1"),
    (chat_with(seed=-2), "seed", "an integer from -1"),
    (chat_with(stop=5), "stop", "a string or a list"),
    (chat_with(stop=["a", 5]), "stop", "a list of strings"),
    (chat_with(stream="yes"), "stream", "true or false"),
    (chat_with(stream_options=[]), "stream_options", "an object"),
    (chat_with(stream=True, stream_options={"include_usage": 1}), "include_usage", "true or false"),
    (chat_with(tools=[{}]), "tools[0].function", "an object with name and parameters"),
    (chat_with(tools=[{"type": "web_search"}]), "tools[0]", "type must be 'function'"),
    (chat_with(tools={}), "tools", "a list"),
    (chat_with(tool_choice="required"), "tool_choice", "where there are no tools"),
    (chat_with(tool_choice="sometimes"), "tool_choice", "'none', 'auto', 'required'"),
    (chat_with(functions=[{}]), "functions", "send them as tools"),
    (chat_with(logprobs=2), "logprobs", "true or false"),
    (chat_with(top_logprobs=2), "top_logprobs", "needs logprobs"),
    (chat_with(logprobs=True, top_logprobs=21), "top_logprobs", "an integer from 0 to 20"),
    (chat_with(logit_bias={"x": 1}), "logit_bias", "an object of token ids"),
    (chat_with(logit_bias={"5": 200}), "5", "a number from -100 to 100"),
    (chat_with(logit_bias={"99999": 1}), "logit_bias", "not among the"),
    (chat_with(response_format={"type": "xml"}), "response_format", "of type 'text'"),
    (chat_with(response_format={"type": "json_schema"}), "response_format", "has a schema"),
    (chat_with(chat_template_kwargs={"tokenize": False}), "chat_template_kwargs", "cannot set"),
    (chat_with(modalities=["audio"]), "modalities", "only text"),
    (chat_with(keep=0), "keep", "above 0"),
    (chat_with(keep=1.5), "keep", "a number from 0 to 1"),
    (chat_with(task=5), "task", "task must be a string"),
    ({**chat_with(task=" "), "model": "tiny"}, "task", "task is empty"),
    ({**chat_with(keep=0.5), "model": "tiny"}, "keep", "keep needs a task"),
    (chat_with(task="help"), "task", "has its sub-network already"),
    (message(content="x" * 600), "messages", "tokens, the model's context 512"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "param", "says"), BAD_FIELDS, ids=lambda value: str(value)[:50].replace("/", "")
)
def test_bad_fields_are_named(
    guarded: Running, body: dict[str, Any], param: str | None, says: str
) -> None:
    raw = json.dumps(body).replace("Infinity", "1e999").encode()
    answer = post(guarded, CHAT, raw)
    check_error(answer, 400, says)
    assert answer[2]["error"]["param"] == param


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{'model': 1}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b"[" * 15_000, "not valid JSON"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 100 levels"),
        (b'{"seed": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b'{"model": "\xff\xfe"}', "not UTF-8"),
    ],
    ids=["syntax", "empty", "list", "nan", "deep", "nested", "huge-integer", "utf-8"],
)
def test_bodies_that_are_no_json_object(guarded: Running, raw: bytes, says: str) -> None:
    check_error(post(guarded, CHAT, raw), 400, says)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "is missing"),
        ("", "is empty"),
        ([1, 2], "not token ids"),
        ({}, "a string"),
        (["a"] * 17, "at most 16"),
    ],
)
def test_bad_prompts_of_completions(guarded: Running, prompt: Any, says: str) -> None:
    check_error(post(guarded, TEXT, {**TEXT_BODY, "prompt": prompt}), 400, says)


def test_prompt_beyond_the_context(guarded: Running) -> None:
    answer = post(guarded, TEXT, {**TEXT_BODY, "prompt": "x" * 512})
    check_error(answer, 400, "the prompt has 512 tokens, the model's context 512")
    assert answer[2]["error"]["code"] == "context_length_exceeded"


def test_a_task_beyond_the_context(guarded: Running) -> None:
    body = {**CHAT_BODY, "model": "tiny", "task": "x" * 600}
    check_error(post(guarded, CHAT, body), 400, "the instruction has")


@pytest.mark.parametrize("model", ["gpt-4", "tiny:law", "tiny:", "tiny:mail:x", "TINY"])
def test_unknown_models(guarded: Running, model: str) -> None:
    answer = post(guarded, CHAT, chat_with(model=model))
    check_error(answer, 404, "there are: tiny, tiny:python-helper, tiny:mail, tiny:dense")
    assert answer[2]["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "path", ["/page", "/v1", "/v1/embeddings", "/v1/chat", "//evil", "/v1/modelsx"]
)
def test_unknown_routes(guarded: Running, path: str) -> None:
    check_error(post(guarded, path, CHAT_BODY), 404, "no route")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", CHAT), ("POST", "/v1/models"), ("DELETE", CHAT), ("PUT", "/health"), ("BREW", "/")],
)
def test_wrong_methods(guarded: Running, method: str, path: str) -> None:
    headers = {"Content-Length": "0"}
    answer = send(guarded, method, path, None, headers)
    assert answer[0] == 405
    assert answer[2]["error"]["code"] == "bad_method"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_wrong_content_types(guarded: Running, content_type: str) -> None:
    answer = post(guarded, CHAT, CHAT_BODY, {"Content-Type": content_type})
    check_error(answer, 415, "application/json")


@pytest.mark.parametrize(
    "headers",
    [{}, {"Content-Length": "many"}, {"Content-Length": "-5"}],
    ids=["missing", "word", "negative"],
)
def test_unusable_content_lengths(guarded: Running, headers: dict[str, str]) -> None:
    answer = send(guarded, "POST", CHAT, None, {**JSON_TYPE, **headers})
    check_error(answer, 411, "no usable Content-Length")


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ({"Transfer-Encoding": "gzip"}, 411, "or come in chunks"),
        ({"Transfer-Encoding": "chunked", "Content-Length": "5"}, 411, "or come in chunks"),
        ({"Content-Length": "5", "Content-Encoding": "gzip"}, 415, "must not be compressed"),
    ],
)
def test_codings_that_are_not_understood(
    guarded: Running, headers: dict[str, str], status: int, says: str
) -> None:
    check_error(send(guarded, "POST", CHAT, None, {**JSON_TYPE, **headers}), status, says)


@pytest.mark.parametrize(
    ("raw", "status", "says"),
    [
        (b"zz\r\n", 400, "no usable length"),
        (b"\r\n", 400, "no usable length"),
        (b"2\r\nabcd\r\n", 400, "the length that they name"),
        (b"fffffff\r\n", 413, "the limit is 20000"),
        (b"8" * 2000, 400, "no usable length"),
        (b"2\r\n{}\r\n0\r\n\r\n", 400, "messages is missing"),
    ],
)
def test_chunks(guarded: Running, raw: bytes, status: int, says: str) -> None:
    headers = {**JSON_TYPE, "Transfer-Encoding": "chunked"}
    check_error(send(guarded, "POST", CHAT, raw, headers), status, says)


def test_a_body_that_is_too_large(guarded: Running) -> None:
    answer = post(guarded, CHAT, chat_with(padding="x" * 200_000))
    check_error(answer, 413, "the limit is 20000")


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", "Basic sesame", "sesame", "Bearer sésame"]
)
def test_wrong_keys(guarded: Running, header: str) -> None:
    answer = post(guarded, CHAT, CHAT_BODY, {"Authorization": header.encode("latin-1")})  # type: ignore[dict-item]
    check_error(answer, 401, "API key is missing or wrong")
    assert answer[1]["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "line",
    [b"NONSENSE", b"GET / HTTP/9.9", b"GET /" + b"x" * 70_000 + b" HTTP/1.1", b"GET / FTP/1"],
)
def test_what_is_no_http_is_refused_in_the_same_shape(guarded: Running, line: bytes) -> None:
    with socket.create_connection(("127.0.0.1", guarded.server.port), timeout=20) as connection:
        connection.sendall(line + b"\r\n\r\n")
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # it stopped reading a line without end
            while part := connection.recv(65536):
                answer += part
    error = json.loads(answer[answer.index(b"{") :])["error"]
    assert set(error) == {"message", "type", "param", "code"}


def test_the_server_still_answers_after_all_of_these(guarded: Running) -> None:
    status, _, body = post(guarded, CHAT, CHAT_BODY)
    assert status == 200
    assert body["usage"]["completion_tokens"] == 2
    assert guarded.server.num_requests == 0
