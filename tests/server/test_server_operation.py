"""What an operator sees: a line a request, metrics, a model that leaves memory when idle."""

import contextlib
import http.client
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.kv_cache import KVCache
from ifp_mlx.errors import ResourceError
from ifp_mlx.server.access import Access
from ifp_mlx.server.content import Content
from ifp_mlx.server.engine import Engine
from ifp_mlx.server.kv_caches import KVCacheFolder
from ifp_mlx.server.request_log import RequestLog, RequestRecord
from ifp_mlx.server.subnet_provider import EngineOptions, Prepared

Running = Any
Serve = Callable[..., contextlib.AbstractContextManager[Running]]
HELLO: Any = [{"role": "user", "content": "hello"}]


def get(running: Running, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()


def test_an_answer_is_one_line(engine: Engine, serve: Serve) -> None:
    with serve(engine) as running:
        running.client().chat.completions.create(
            model="tiny:mail", messages=HELLO, max_tokens=6, stream=False
        )
        line = running.line_with("POST")
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d POST /v1/chat/completions 200, tiny:mail, "
        r"task 'write friendly e-mails to my aunt', \d+ (\(\d+ cached\) )?\+ 6 tokens, "
        r"first after \d+\.\d\d s, \d+\.\d tokens/s, length",
        line,
    )


def test_a_refusal_says_why(engine: Engine, serve: Serve) -> None:
    with serve(engine) as running:
        with pytest.raises(openai.BadRequestError):
            running.client().chat.completions.create(model="tiny", messages=HELLO, temperature=5)
        with pytest.raises(openai.NotFoundError):
            running.client().chat.completions.create(model="a\nb\x1b[2J", messages=HELLO)
        assert running.line_with("400, temperature must be a number from 0 to 2")
        assert running.line_with("404, a\\nb\\x1b[2J, no model")


@pytest.mark.parametrize(
    ("status", "cause", "is_written"),
    [(200, "", False), (404, "", False), (500, "", True), (503, "", True), (200, "OSError", True)],
)
def test_server_errors_are_always_logged(status: int, cause: str, is_written: bool) -> None:
    lines: list[str] = []
    log = RequestLog(lines.append, only_server_errors=True)
    log.note(RequestRecord("POST", "/x", status, error="no\tway", cause=cause))
    assert len(lines) == is_written
    for line in lines:
        assert "no way" in line
        assert ("cause: OSError" in line) == bool(cause)


def test_an_error_of_ours_in_a_request_is_logged_with_its_reason(
    checkpoint_folder: Path, serve: Serve
) -> None:
    def prepare() -> Prepared:
        assistant = Assistant.load(checkpoint_folder)

        def fail(*_: object) -> None:
            raise ResourceError("the disk is full; free some")

        assistant.subnetwork_for_task = fail  # type: ignore[method-assign,assignment]
        return assistant, lambda task: 64

    engine = Engine(prepare, EngineOptions())
    try:
        with serve(engine) as running:
            with pytest.raises(openai.InternalServerError, match="the disk is full"):
                running.client().chat.completions.create(model="tiny:mail", messages=HELLO)
            assert running.client().chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=2
            )
            assert "the disk is full" in running.line_with("500, tiny:mail")
    finally:
        engine.stop()


def test_metrics_count(engine: Engine, serve: Serve) -> None:
    with serve(engine, access=Access("sesame")) as running:
        client = running.client("sesame")
        for _ in range(2):
            client.chat.completions.create(model="tiny:mail", messages=HELLO, max_tokens=6)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny", messages=HELLO, temperature=5)
        assert get(running, "/nowhere")[0] == 404
        assert get(running, "/metrics")[0] == 401
        assert running.line_with("401")
        status, headers, body = get(running, "/metrics", Authorization="Bearer sesame")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    assert samples["ifp_requests_total", "/chat/completions", "200"] == 2
    assert samples["ifp_requests_total", "/chat/completions", "400"] == 1
    assert samples["ifp_requests_total", "404", "other"] == 1
    assert samples["ifp_tokens_total", "completion"] == 12
    assert samples[("ifp_first_token_seconds_count",)] == 2
    assert samples[("ifp_requests_in_work",)] == 0
    assert samples[("ifp_model_loaded",)] == 1
    assert samples[("ifp_memory_bytes",)] > 0


def test_files_are_served_as_they_are(engine: Engine, serve: Serve) -> None:
    with serve(engine, access=Access("sesame")) as running:
        running.server.files = {}
        assert get(running, "/")[0] == 404
        page = Content("text/html; charset=utf-8", b"<p>hi", {"Cache-Control": "no-cache"})
        running.server.files = {"/": page}
        status, headers, body = get(running, "/")  # a page must load before it can ask for the key
        assert (status, body) == (200, b"<p>hi")
        assert headers["Cache-Control"] == "no-cache"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert get(running, "/", Host="evil.example.org")[0] == 403


@pytest.fixture
def idle_engine(checkpoint_folder: Path) -> Iterator[tuple[Engine, list[int]]]:
    loads: list[int] = []

    def prepare() -> Prepared:
        loads.append(1)
        return Assistant.load(checkpoint_folder), lambda task: 64

    engine = Engine(prepare, EngineOptions(keep_alive_s=0.3))
    yield engine, loads
    engine.stop()


def test_an_idle_model_leaves_memory_and_comes_back(
    idle_engine: tuple[Engine, list[int]], serve: Serve
) -> None:
    engine, loads = idle_engine
    with serve(engine) as running:
        client = running.client()

        def ask() -> str:
            answer = client.chat.completions.create(model="tiny:mail", messages=HELLO, max_tokens=6)
            return str(answer.choices[0].message.content)

        first = ask()
        num_loads = len(loads)  # on a busy machine it was idle before the first request, too
        before_bytes = mx.get_active_memory()
        is_loaded = engine.gauges()["model_loaded"][1]
        deadline = time.monotonic() + 10
        while (is_loaded() or mx.get_active_memory() >= before_bytes) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.05)
        assert not is_loaded()
        assert mx.get_active_memory() < before_bytes - 100_000
        assert ask() == first
        assert len(loads) == num_loads + 1
        assert get(running, "/health")[0] == 200
        assert json.loads(get(running, "/v1/models")[2])["data"]


def prompt_tokens(engine: Engine, serve: Serve, text: str) -> tuple[str, int]:
    """Return the answer to a message, and how much of its prompt was in a KV cache."""
    with serve(engine) as running:
        answer: Any = running.client().chat.completions.create(
            model="tiny:mail", messages=[{"role": "user", "content": text}], max_tokens=6
        )
    return answer.choices[0].message.content, answer.usage.prompt_tokens_details.cached_tokens


def test_conversations_go_on_after_a_restart(
    checkpoint_folder: Path, serve: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    options = EngineOptions(prompt_cache_folder=folder)
    outcomes = []
    for _ in range(2):
        engine = Engine(lambda: (Assistant.load(checkpoint_folder), lambda task: 64), options)
        try:
            outcomes.append(prompt_tokens(engine, serve, "a long and winding question"))
        finally:
            engine.stop()
    assert outcomes[0] == (outcomes[1][0], 0)
    assert outcomes[1][1] > 20
    for path in folder.iterdir():
        path.write_bytes(b"damaged")
    engine = Engine(lambda: (Assistant.load(checkpoint_folder), lambda task: 64), options)
    try:
        assert prompt_tokens(engine, serve, "a long and winding question") == outcomes[0]
    finally:
        engine.stop()


def test_kv_caches_on_disk_are_bounded(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = KVCacheFolder(tmp_path, 600_000)
    for number in range(8):
        layer = mlx_lm.models.cache.KVCache()
        layer.update_and_fetch(
            mx.zeros((1, 2, 8, 64)), mx.zeros((1, 2, 8, 64))
        )  # 262 kB: room for 256 tokens
        folder.save(b"key", KVCache([layer], list(range(number, number + 8))))
        time.sleep(0.01)
    folder.trim()
    kept = list(folder.load(b"key"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 600_000
    assert [cache.token_ids[0] for cache in kept] == [6, 7]
    assert not list(folder.load(b"other"))
