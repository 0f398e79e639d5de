"""Routes, limits, keys and draining, on Python's own threading HTTP server."""

import contextlib
import dataclasses
import hmac
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from ifp_mlx import __version__
from ifp_mlx.errors import IFPError, UsageError
from ifp_mlx.server.api_error import APIError
from ifp_mlx.server.catalog import ModelCatalog
from ifp_mlx.server.engine import Engine
from ifp_mlx.server.replies import Piece, Reply
from ifp_mlx.server.requests import (
    GenerationRequest,
    RequestDefaults,
    parse_chat_request,
    parse_completion_request,
    parse_json,
)
from ifp_mlx.server.responses import ResponseShape

_SOCKET_TIMEOUT_S = 30.0  # a client that neither sends nor reads for so long is given up
_MAX_DISCARDED_BYTES = 64 * 2**20
_POST_ROUTES = ("/v1/chat/completions", "/v1/completions")
_GET_ROUTES = ("/v1/models", "/health")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
        max_body_bytes: of a request's body.
        max_requests: answered and waiting at a time; one more is refused with 429.
        time_limit_s: for one answer, waiting for its turn included.
    """

    max_body_bytes: int = 2**20
    max_requests: int = 64
    time_limit_s: float = 300.0

    def __post_init__(self) -> None:
        if min(self.max_body_bytes, self.max_requests, self.time_limit_s) <= 0:
            raise UsageError("the server's limits must be above 0")


class ClientGone(Exception):
    """The client closed its connection: nobody reads the answer."""


class Server(ThreadingHTTPServer):
    """Answers on a socket, one thread a connection, one generation thread for all.

    Args:
        host: address to bind to; 0.0.0.0 or :: is every address of the machine.
        port: 0 takes a free one.
        engine: what generates.
        catalog: the names that it serves.
        defaults: what a request that does not say gets.
        limits: what requests may take.
        api_key: what clients must send as a bearer token; None asks for none.
        on_log: called with one line a request.

    Raises:
        UsageError: the address cannot be bound.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        *,
        engine: Engine,
        catalog: ModelCatalog,
        defaults: RequestDefaults,
        limits: Limits,
        api_key: str | None = None,
        on_log: Callable[[str], None] = lambda line: None,
    ):
        self.engine = engine
        self.catalog = catalog
        self.defaults = defaults
        self.limits = limits
        self.api_key = api_key
        self.on_log = on_log
        self.started_s = int(time.time())
        self.is_draining = False
        self._num_requests = 0
        self._changed = threading.Condition()
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family = family
            super().__init__(address[:2], _Handler)  # type: ignore[arg-type]
        except (OSError, OverflowError) as error:
            raise UsageError(f"cannot listen on {host} port {port}: {error}") from error

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return int(self.server_address[1])

    @property
    def num_requests(self) -> int:
        """Requests in work and waiting."""
        return self._num_requests

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the limited places for a request.

        Raises:
            APIError: 429 when all are taken, 503 when the server is stopping.
        """
        with self._changed:
            if self.is_draining:
                raise APIError(503, "the server is stopping", code="stopping")
            if self._num_requests >= self.limits.max_requests:
                raise APIError(
                    429,
                    f"{self._num_requests} requests are in work already; try again in a second",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            self._num_requests += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_requests -= 1
                self._changed.notify_all()

    def drain(self, time_limit_s: float) -> bool:
        """Refuse new requests with 503 and wait for those in work; return whether all ended."""
        with self._changed:
            self.is_draining = True
            return self._changed.wait_for(lambda: self._num_requests == 0, time_limit_s)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about connections that broke; a handler reports its own errors."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version = f"ifp-mlx/{__version__}"
    sys_version = ""
    timeout = _SOCKET_TIMEOUT_S
    disable_nagle_algorithm = True  # pieces of an answer go out as they come
    _body_is_read = False
    _headers_are_sent = False

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Report what the base class found wrong, in the shape of all other errors."""
        self.close_connection = True
        if code == 501:
            self._send_error(APIError(405, "only GET and POST are served here", code="bad_method"))
        else:
            self._send_error(APIError(int(code), message or "the request is not valid HTTP"))

    def log_message(self, format: str, *args: Any) -> None:
        self.server.on_log(f"{self.client_address[0]} {format % args}")

    def _respond(self) -> None:
        self._body_is_read = self._headers_are_sent = False
        try:
            self._route(urlsplit(self.path).path.rstrip("/"))
        except APIError as error:
            self._send_error(error)
        except UsageError as error:
            self._send_error(APIError(400, str(error)))
        except IFPError as error:
            self._send_error(APIError(500, str(error)))
        except (ClientGone, ConnectionError):
            self.close_connection = True
            self.log_message("client left during %s", self.path)
        except TimeoutError:
            if self._headers_are_sent:  # it does not read what we send
                self.close_connection = True
            else:
                self._send_error(APIError(408, "the request's body did not arrive in time"))
        except Exception as error:  # a bug of ours: the client gets one line, not a traceback
            self.log_message("internal error: %s: %s", type(error).__name__, error)
            self._send_error(APIError(500, "internal error; the server's log says more"))

    def _route(self, path: str) -> None:
        if path not in (*_POST_ROUTES, *_GET_ROUTES) and not path.startswith("/v1/models/"):
            raise APIError(404, f"no route {path or '/'!r}", code="unknown_route")
        method = "POST" if path in _POST_ROUTES else "GET"
        if self.command != method:
            headers = {"Allow": method}
            raise APIError(405, f"{path} takes {method}", code="bad_method", headers=headers)
        if path == "/health":
            self._send_health()
            return
        self._check_key()
        if path in _POST_ROUTES:
            self._generate(is_chat=path == "/v1/chat/completions")
        elif path == "/v1/models":
            models = [self._model(name) for name in self.server.catalog.names]
            self._send_json(200, {"object": "list", "data": models})
        else:
            self._send_model(unquote(path.removeprefix("/v1/models/")))

    def _check_key(self) -> None:
        if self.server.api_key is None:
            return
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        matches = hmac.compare_digest(given.strip().encode(), self.server.api_key.encode())
        if scheme.lower() != "bearer" or not matches:
            raise APIError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _read_body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":
            raise APIError(415, "the body must have the content type application/json")
        length = self._content_length()
        if length is None:
            raise APIError(411, "the request has no usable Content-Length")
        limit = self.server.limits.max_body_bytes
        if length > limit:
            self._discard(length)
            raise APIError(413, f"the body has {length} bytes, the limit is {limit}")
        raw = self.rfile.read(length)
        self._body_is_read = True
        return raw

    def _content_length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None

    def _discard(self, length: int) -> None:
        """Read a body to throw it away: clients look for an answer when they have sent all."""
        if length <= _MAX_DISCARDED_BYTES:
            while length > 0 and (part := self.rfile.read(min(length, 2**16))):
                length -= len(part)
            self._body_is_read = length == 0

    def _generate(self, *, is_chat: bool) -> None:
        parse = parse_chat_request if is_chat else parse_completion_request
        request = parse(parse_json(self._read_body()), self.server.defaults)
        choice = self.server.catalog.choose(request)
        with self.server.place():
            if not self.server.engine.is_healthy:
                raise APIError(503, "the generation thread has died; restart the server")
            reply = self.server.engine.start(request, choice)
            shape = ResponseShape(is_chat=is_chat, model=request.model)
            pieces = reply.pieces(self.server.limits.time_limit_s, self._check_client)
            with contextlib.closing(pieces):
                if request.stream:
                    self._send_stream(request, shape, reply, pieces)
                else:
                    self._send_whole(shape, reply, pieces, is_chat=is_chat)

    def _send_whole(
        self, shape: ResponseShape, reply: Reply, pieces: Iterator[Piece], *, is_chat: bool
    ) -> None:
        text: list[str] = []
        reasoning: list[str] = []
        for piece in pieces:
            (reasoning if piece.is_reasoning and is_chat else text).append(piece.text)
        self._send_json(200, shape.whole("".join(text), "".join(reasoning), reply))

    def _send_stream(
        self,
        request: GenerationRequest,
        shape: ResponseShape,
        reply: Reply,
        pieces: Iterator[Piece],
    ) -> None:
        first = next(
            pieces, None
        )  # what goes wrong before the first token gets a status of its own
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")  # marks the end: the length is not known
        self.end_headers()
        self._headers_are_sent = True
        self.close_connection = True
        opening = shape.opening(reply)
        if opening is not None:
            self._send_event(opening)
        if first is not None:
            self._send_event(shape.piece(first, reply))
        for piece in pieces:
            self._send_event(shape.piece(piece, reply))
        self._send_event(shape.closing(reply))
        if request.include_usage:
            self._send_event(shape.token_counts(reply))
        self.wfile.write(b"data: [DONE]\n\n")

    def _check_client(self) -> None:
        """Look whether the client is still there and the generation thread alive."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and self.connection.recv(1, socket.MSG_PEEK) == b"":
            raise ClientGone
        if not self.server.engine.is_healthy:
            raise APIError(503, "the generation thread has died; restart the server")

    def _send_health(self) -> None:
        healthy = self.server.engine.is_healthy and not self.server.is_draining
        self._send_json(200 if healthy else 503, {"status": "ok" if healthy else "unavailable"})

    def _send_model(self, name: str) -> None:
        if name not in self.server.catalog.names:
            raise APIError(404, f"no model {name!r} here", param="model", code="model_not_found")
        self._send_json(200, self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        created = self.server.started_s
        return {"id": name, "object": "model", "created": created, "owned_by": "ifp-mlx"}

    def _send_event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _send_json(
        self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self._headers_are_sent = True
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _send_error(self, error: APIError) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            if self._headers_are_sent:  # in the middle of a stream
                self._send_event(error.body())
                return
            if self.command == "POST" and not self._body_is_read:
                self.close_connection = True  # what follows on this connection is not a request
            self._send_json(error.status, error.body(), error.headers)
