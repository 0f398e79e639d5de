"""What the page is made of: its files, tasks as JSON, their pictures; who may have them."""

import contextlib
import http.client
import json
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest

from ifp_mlx.errors import UsageError
from ifp_mlx.server.access import Access
from ifp_mlx.server.api_error import APIError
from ifp_mlx.server.http import Limits

Running = Any
Serve = Callable[..., contextlib.AbstractContextManager[Running]]


def get(
    running: Running,
    path: str,
    *,
    method: str = "GET",
    key: str = "",
    origin: str = "",
    body: bytes | None = None,
    **query: Any,
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=20)
    with contextlib.closing(connection):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= {"Origin": origin} if origin else {}
        headers |= {} if body is None else {"Content-Type": "application/json"}
        address = f"{path}?{urlencode(query, doseq=True)}" if query else path
        connection.request(method, address, body, headers)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()


def get_json(running: Running, path: str, **query: Any) -> Any:
    status, _, body = get(running, path, **query)
    assert status == 200, body
    return json.loads(body)


def select(running: Running, task: str) -> Any:
    body = json.dumps({"task": task}).encode()
    status, _, answer = get(running, "/ifp/select", method="POST", body=body)
    assert status == 200, answer
    return json.loads(answer)


def refusal(running: Running, path: str, **query: Any) -> tuple[int, str]:
    status, _, body = get(running, path, **query)
    return status, json.loads(body)["error"]["message"]


def test_the_page_is_served_to_anybody_and_may_load_nothing_from_elsewhere(
    engine: Any, serve: Serve
) -> None:
    with serve(engine, access=Access("sesame")) as running:
        for path, content_type in (
            ("/", "text/html"),
            ("/page/style.css", "text/css"),
            ("/page/page.js", "text/javascript"),
            ("/page/icon.svg", "image/svg+xml"),
        ):
            status, headers, body = get(running, path)
            assert (status, headers["Content-Type"].partition(";")[0]) == (200, content_type)
            policy = dict(
                rule.strip().split(" ", 1) for rule in headers["Content-Security-Policy"].split(";")
            )
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert body
        assert get(running, "/", method="POST")[0] == 405
        assert get(running, "/page/../page_files.py")[0] == 404


def test_tasks_are_told_with_what_they_take_and_share(running: Running) -> None:
    told = get_json(running, "/ifp/tasks")
    assert (told["model"], told["default"], told["unit_label"]) == ("tiny", "dense", "FFN units")
    assert [task["model"] for task in told["tasks"]] == ["tiny:python-helper", "tiny:mail"]
    assert {task["num_kept_units"] for task in told["tasks"]} == {64}
    assert all(0 < task["bytes"] < told["whole"]["bytes"] for task in told["tasks"])
    first, second = told["overlaps"]
    assert first[0] == second[1] == 1
    assert first[1] == second[0]
    assert 0 < first[1] < 1
    assert told["memory_bytes"] <= told["memory_peak_bytes"]


def test_speed_is_that_of_the_latest_answer(engine: Any, serve: Serve) -> None:
    with serve(engine) as running:
        client = running.client()
        for name in ("tiny:mail", "tiny:dense"):
            messages = [{"role": "user", "content": "hi"}]
            client.chat.completions.create(model=name, messages=messages)
        running.line_with("tiny:dense")
        told = get_json(running, "/ifp/tasks")
    assert told["whole"]["tokens_per_s"] > 0
    assert told["tasks"][1]["tokens_per_s"] > 0


def test_a_description_is_a_task_too_once_it_is_selected(running: Running) -> None:
    task = select(running, "bake a cake")
    assert (task["id"], task["num_kept_units"], "model" in task) == ("bake a cake", 64, False)
    told = get_json(running, "/ifp/tasks", task=["bake a cake", "mail"])
    assert [task["id"] for task in told["tasks"]] == ["python-helper", "mail", "bake a cake"]
    assert len(told["overlaps"]) == len(told["overlap_names"]) == 3
    assert "bake a cake: 64" in get_json(running, "/ifp/units", task="bake a cake")["description"]


def test_descriptions_are_told_only_to_who_gives_them(running: Running) -> None:
    select(running, "a secret task")
    assert "secret" not in json.dumps(get_json(running, "/ifp/tasks"))


def test_what_a_browser_can_be_made_to_get_selects_nothing(running: Running) -> None:
    told = get_json(running, "/ifp/tasks", task="something of another page")
    assert "/ifp/select" in told["tasks"][2]["error"]
    assert told["overlap_names"] == ["python-helper", "mail"]
    for path in ("/ifp/units", "/ifp/picture"):
        status, message = refusal(running, path, task="something of another page")
        assert (status, "/ifp/select" in message) == (404, True)
    status, _, body = get(running, "/ifp/select", method="POST", origin="https://example.org")
    assert (status, "--allowed-origins" in body.decode()) == (403, True)
    assert get(running, "/ifp/select", task="x")[0] == 405


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b'{"task": "' + b"word " * 300 + b'"}', "shorten it"),
        (b'{"task": " "}', "empty"),
        (b'{"task": 7}', "say which task"),
        (b"{}", "say which task"),
        (b"task=x", "not valid JSON"),
    ],
)
def test_what_cannot_be_selected_is_refused(running: Running, body: bytes, complaint: str) -> None:
    status, _, answer = get(running, "/ifp/select", method="POST", body=body)
    assert (status, complaint in json.loads(answer)["error"]["message"]) == (400, True)


def test_units_are_told_layer_by_layer(running: Running, engine: Any) -> None:
    told = get_json(running, "/ifp/units", task="mail")
    assert told["layers"] == [{"layer": n, "kept": 64} for n in (1, 2, 3)]
    told = get_json(running, "/ifp/units", task="mail", against="python-helper")
    shared = [layer["shared"] for layer in told["layers"]]
    overlap = get_json(running, "/ifp/tasks")["overlaps"][0][1]
    assert sum(shared) / (3 * 64) == pytest.approx(overlap, abs=1e-3)
    assert "mail: 64 of 192 FFN units" in told["description"]


def test_pictures_are_svg_that_runs_nothing(running: Running) -> None:
    for against in ([], ["python-helper"]):
        query = {"task": "mail", "width": 400, "against": against}
        status, headers, body = get(running, "/ifp/picture?" + urlencode(query, doseq=True))
        assert (status, headers["Content-Type"]) == (200, "image/svg+xml")
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert ElementTree.fromstring(body).attrib["width"] == "400"
    for given, width in (("1", "280"), ("9" * 40, "1600"), ("", "760")):
        _, _, body = get(running, "/ifp/picture", task="mail", width=given)
        assert ElementTree.fromstring(body).attrib["width"] == width


def test_what_makes_no_sense_is_refused(running: Running) -> None:
    assert refusal(running, "/ifp/units") == (400, "say which task")
    assert refusal(running, "/ifp/picture", task="mail", width="wide")[0] == 400
    assert refusal(running, "/ifp/tasks", task=[f"task {n}" for n in range(9)])[0] == 400
    assert refusal(running, "/ifp/nothing")[0] == 404
    assert get(running, "/ifp/tasks", method="POST")[0] == 405


def test_the_key_is_needed(engine: Any, serve: Serve) -> None:
    with serve(engine, access=Access("sesame")) as running:
        for path in ("/ifp/tasks", "/ifp/units", "/ifp/picture"):
            assert get(running, path, task="mail")[0] == 401
            assert get(running, path, task="mail", key="sesame")[0] == 200


def test_without_tasks_the_whole_model_is_told(engine: Any, serve: Serve) -> None:
    with serve(engine, tasks={}) as running:
        told = get_json(running, "/ifp/tasks")
    assert (told["tasks"], told["overlaps"]) == ([], [])
    assert told["whole"]["bytes"] > 0


def test_who_waits_for_long_is_told_to_come_back(engine: Any) -> None:
    busy = threading.Event()
    engine._generator.requests.put((_Blocking(busy), *_nothing(engine)))
    try:
        begun = time.monotonic()
        with pytest.raises(APIError, match="other answers are in work") as refused:
            engine.facts(_request("something new"), 0.3, lambda: None)
        assert refused.value.status == 503
        assert time.monotonic() - begun < 5
        with pytest.raises(UsageError, match="gone"):
            engine.facts(_request("something newer"), 10, _client_leaves)
    finally:
        busy.set()
    assert engine.facts(_request("something new"), 20, lambda: None).units.num_kept_units == 64


class _Blocking:
    """Where the generation thread puts its answer; it waits there."""

    def __init__(self, until: threading.Event):
        self._until = until

    def put(self, event: Any) -> None:
        self._until.wait(20)


def _nothing(engine: Any) -> tuple[Any, Any]:
    from mlx_lm.server import CompletionRequest

    from ifp_mlx.server.generator import make_arguments

    return CompletionRequest("text", "", [], None, None), make_arguments(_request("x"), None, 1)


def _request(text: str) -> Any:
    from ifp_mlx.server.catalog import SubnetRequest

    return SubnetRequest("task", text)


def _client_leaves() -> None:
    raise UsageError("gone")


def test_a_busy_server_refuses_views_as_it_refuses_requests(engine: Any, serve: Serve) -> None:
    with serve(engine, Limits(max_requests=1)) as running, running.server.place():
        assert refusal(running, "/ifp/tasks")[0] == 429


def test_what_the_page_asks_for_is_in_the_log_only_if_it_is_refused(running: Running) -> None:
    running.log.clear()
    for path in ("/", "/page/page.js", "/ifp/tasks"):
        assert get(running, path)[0] == 200
    assert refusal(running, "/ifp/units")[0] == 400
    running.line_with("GET /ifp/units 400, say which task")
    assert len(running.log) == 1
