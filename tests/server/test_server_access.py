"""Who may use the server: pages of other origins, names that are not its own, keys."""

import contextlib
import hmac
import http.client
import json
from collections.abc import Callable
from typing import Any

import pytest

from ifp_mlx.errors import UsageError
from ifp_mlx.server.access import Access
from ifp_mlx.server.http import Limits

Running = Any
Serve = Callable[..., contextlib.AbstractContextManager[Running]]
CHAT = "/v1/chat/completions"
PAGE = "https://chat.example.org"
BODY = json.dumps(
    {"model": "tiny:mail", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
).encode()


def send(
    running: Running, method: str, path: str, headers: dict[str, str], body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()


def ask(running: Running, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return send(running, "POST", CHAT, {"Content-Type": "application/json", **headers}, BODY)


def preflight(running: Running, origin: str) -> tuple[int, dict[str, str], bytes]:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
        "Access-Control-Request-Private-Network": "true",
    }
    return send(running, "OPTIONS", CHAT, headers)


def granted(headers: dict[str, str]) -> set[str]:
    return {name for name in headers if name.startswith("Access-Control")}


def test_pages_of_other_origins_are_refused(running: Running) -> None:
    for status, headers, body in (
        preflight(running, PAGE),
        ask(running, Origin=PAGE),
        ask(running, Origin="null"),
        ask(running, Origin=f"http://127.0.0.1:{running.server.port}.evil.org"),
        send(running, "GET", "/v1/models", {"Origin": PAGE}),
    ):
        assert status == 403
        assert not granted(headers)
        assert "--allowed-origins" in json.loads(body)["error"]["message"]


def test_the_servers_own_page_may(running: Running) -> None:
    for host in ("127.0.0.1", "localhost"):
        own = f"{host}:{running.server.port}"
        status, headers, _ = ask(running, Origin=f"http://{own}", Host=own)
        assert status == 200
        assert not granted(headers)


def test_a_page_that_is_allowed_may(engine: Any, serve: Serve) -> None:
    with serve(engine, access=Access("sesame", allowed_origins=(PAGE,))) as running:
        status, headers, body = preflight(running, PAGE)  # browsers send no key with it
        assert (status, body) == (204, b"")
        assert headers["Access-Control-Allow-Origin"] == PAGE
        assert headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        assert headers["Access-Control-Allow-Private-Network"] == "true"
        assert "POST" in headers["Access-Control-Allow-Methods"]
        status, headers, _ = ask(running, Origin=PAGE, Authorization="Bearer sesame")
        assert status == 200
        assert (headers["Access-Control-Allow-Origin"], headers["Vary"]) == (PAGE, "Origin")
        status, headers, _ = ask(running, Origin=PAGE)  # it can read why it was refused
        assert status == 401
        assert headers["Access-Control-Allow-Origin"] == PAGE
        assert preflight(running, "https://other.example.org")[0] == 403


def test_every_page_may_if_that_was_said(engine: Any, serve: Serve) -> None:
    with serve(engine, access=Access(allowed_origins=("*",))) as running:
        assert preflight(running, PAGE)[1]["Access-Control-Allow-Origin"] == "*"
        assert ask(running, Origin="null")[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example.org",
        "evil.example.org:8080",
        "localhost.evil.org",
        "127.0.0.1.nip.io",
        "",
        "[",
    ],
)
def test_names_of_others_are_refused(running: Running, host: str) -> None:
    status, _, body = send(running, "GET", "/health", {"Host": host})
    assert status == 403
    assert "--allowed-hosts" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "127.0.0.1", "192.168.1.7:8080", "[::1]:8080", "[fe80::1%25en0]",
     "mac.local", "host.docker.internal:8080", "app.localhost", "localhost."],
)  # fmt: skip
def test_local_names_are_the_servers(running: Running, host: str) -> None:
    assert send(running, "GET", "/health", {"Host": host})[0] == 200


def test_further_names_can_be_allowed(engine: Any, serve: Serve) -> None:
    with serve(engine, access=Access(allowed_hosts=("models.example.org",))) as running:
        assert send(running, "GET", "/health", {"Host": "Models.example.org:443"})[0] == 200
        assert send(running, "GET", "/health", {"Host": "example.org"})[0] == 403
    with serve(engine, access=Access(allowed_hosts=("*",))) as running:
        assert send(running, "GET", "/health", {"Host": "evil.example.org"})[0] == 200


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://", "*.org", ""])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(UsageError, match="is no origin"):
        Access(allowed_origins=(origin,))


def test_keys_are_compared_in_constant_time(
    engine: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    compare = hmac.compare_digest

    def spy(given: bytes, key: bytes) -> bool:
        compared.append((given, key))
        return compare(given, key)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    with serve(engine, access=Access("sesame")) as running:
        assert ask(running, Authorization="Bearer sesam")[0] == 401
        assert ask(running, Authorization="Bearer sesame")[0] == 200
    assert compared == [(b"sesam", b"sesame"), (b"sesame", b"sesame")]


def test_a_body_without_an_end_is_bounded(engine: Any, serve: Serve) -> None:
    with serve(engine, Limits(max_body_bytes=5000)) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest("POST", CHAT)
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    connection.send(b"400\r\n" + b" " * 1024 + b"\r\n")
            with contextlib.suppress(ConnectionError):  # it may be closed under what is sent
                assert connection.getresponse().status == 413
        assert ask(running)[0] == 200
        assert running.line_with(" 413,")
