"""Routes, limits and draining, on Python's own threading HTTP server."""

import contextlib
import dataclasses
import itertools
import json
import select
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ifp_mlx import __version__
from ifp_mlx.errors import IFPError, UsageError
from ifp_mlx.server import metrics
from ifp_mlx.server.access import Access
from ifp_mlx.server.api_error import APIError
from ifp_mlx.server.bodies import Body
from ifp_mlx.server.catalog import ModelCatalog
from ifp_mlx.server.content import Content
from ifp_mlx.server.engine import Engine
from ifp_mlx.server.fields import parse_json
from ifp_mlx.server.replies import Answers
from ifp_mlx.server.request_log import RequestLog, RequestRecord
from ifp_mlx.server.requests import (
    GenerationRequest,
    RequestDefaults,
    parse_chat_request,
    parse_completion_request,
)
from ifp_mlx.server.responses import ResponseShape, usage
from ifp_mlx.server.task_views import TaskViews

_SOCKET_TIMEOUT_S = 30.0  # a client that neither sends nor reads for so long is given up
_CLIENT_LEFT = 499  # nobody gets to see this status; nginx logs the same
_CHAT = "/chat/completions"
_METHODS = {
    _CHAT: "POST",
    "/completions": "POST",
    "/models": "GET",
    "/health": "GET",
    "/metrics": "GET",
}
_ELSEWHERE = {  # what other servers have, and what to use here
    "/responses": "there is no Responses API here; use /v1/chat/completions",
    "/messages": "this is OpenAI's API, not Anthropic's; use /v1/chat/completions",
    "/embeddings": "there are no embeddings here; the model writes text",
    "/api/chat": "this is OpenAI's API, not Ollama's; use /v1/chat/completions",
    "/api/generate": "this is OpenAI's API, not Ollama's; use /v1/completions",
    "/api/tags": "this is OpenAI's API, not Ollama's; use /v1/models",
}


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
        access: who may use it.
        log: gets one line a request.
        files: path -> what is served there, without a key.

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
        access: Access,
        log: RequestLog,
        files: Mapping[str, Content] | None = None,
    ):
        self.engine = engine
        self.catalog = catalog
        self.defaults = defaults
        self.limits = limits
        self.access = access
        self.log = log
        self.files = files or {}
        self.views = TaskViews(engine, catalog, limits.time_limit_s).routes
        self.started_s = int(time.time())
        self.is_draining = False
        self.metrics = metrics.Metrics(
            {
                "requests_in_work": ("Requests in work and waiting.", lambda: self._num_requests),
                **engine.gauges(),
            }
        )
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
    _record = RequestRecord("", "")
    _cors: Mapping[str, str] = {}
    _body: Body | None = None
    _headers_are_sent = False

    def do_GET(self) -> None:
        self._respond()

    def do_HEAD(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def do_OPTIONS(self) -> None:
        self._respond()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Report what the base class found wrong, in the shape of all other errors."""
        self.close_connection = True
        self._begin()
        if code == 501:
            error = APIError(405, "only GET and POST are served here", code="bad_method")
        else:
            error = APIError(int(code), message or "the request is not valid HTTP")
        self._send_error(error)
        self._note("other")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: each request has a line of its own in the end."""

    def _begin(self) -> None:
        self._headers_are_sent = False
        self._body = None
        self._cors = {}
        path = urlsplit(getattr(self, "path", "")).path
        self._record = RequestRecord(self.command or "", path)

    def _respond(self) -> None:
        self._begin()
        path = self._record.path.rstrip("/")
        route = path.removeprefix("/v1") or "/"
        try:
            self.server.access.check_host(self.headers)
            self._cors = self.server.access.cors_headers(self.headers)
            if self.command == "OPTIONS":
                self._send_preflight()
            else:
                self._route(path, route)
        except APIError as error:
            self._send_error(error)
        except UsageError as error:
            self._send_error(APIError(400, str(error)))
        except IFPError as error:
            self._send_error(APIError(500, str(error)))
        except (ClientGone, ConnectionError):
            self.close_connection = True
            self._record.status, self._record.error = _CLIENT_LEFT, "the client left"
        except TimeoutError:
            self.close_connection = True
            if self._headers_are_sent:
                self._record.status, self._record.error = _CLIENT_LEFT, "the client does not read"
            else:
                self._send_error(APIError(408, "the request's body did not arrive in time"))
        except Exception as error:  # a bug of ours: the client gets one line, not a traceback
            where = traceback.extract_tb(error.__traceback__)[-1]
            cause = f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
            self._record.cause = cause
            self._send_error(APIError(500, "internal error; the server's log says more"))
        is_known = route in _METHODS or route in self.server.views
        self._note(route if is_known else "other")

    def _note(self, route: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads standard error any more
            self.server.log.note(self._record)
        self.server.metrics.note(self._record, route)

    def _route(self, path: str, route: str) -> None:
        if (file := self.server.files.get(path or "/")) is not None:
            self._record.is_of_page = True
            self._check_method(path or "/", "GET")
            self._send(200, file.content_type, file.raw, file.headers)
            return
        is_model = route.startswith("/models/")
        view = self.server.views.get(route)
        if route not in _METHODS and not is_model and view is None:
            hint = _ELSEWHERE.get(route)
            message = f"no route {path or '/'!r}" + (f": {hint}" if hint else "")
            raise APIError(404, message, code="unknown_route")
        self._check_method(path, view.method if view else _METHODS.get(route, "GET"))
        if route == "/health":
            self._send_health()
            return
        self.server.access.check_key(self.headers)
        if view is not None:
            self._record.is_of_page = True
            fields = self._view_fields()
            with self.server.place():
                answer = view.answer(fields, self._check_client)
            self._send(200, answer.content_type, answer.raw, answer.headers)
        elif self.command == "POST":
            self._generate(is_chat=route == _CHAT)
        elif route == "/models":
            models = [self._model(name) for name in self.server.catalog.names]
            self._send_json(200, {"object": "list", "data": models})
        elif route == "/metrics":
            self._send(200, metrics.CONTENT_TYPE, self.server.metrics.text())
        else:
            self._send_model(unquote(route.removeprefix("/models/")))

    def _check_method(self, path: str, method: str) -> None:
        if self.command != method and not (method == "GET" and self.command == "HEAD"):
            headers = {"Allow": method}
            raise APIError(405, f"{path} takes {method}", code="bad_method", headers=headers)

    def _send_preflight(self) -> None:
        """Tell a browser what a page of an allowed origin may send."""
        headers = {"Allow": "GET, POST, OPTIONS"}
        if self._cors:
            headers |= {
                "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                "Access-Control-Allow-Headers": self.headers.get(
                    "Access-Control-Request-Headers", "Authorization, Content-Type"
                ),
                "Access-Control-Max-Age": "600",
            }
            if "Access-Control-Request-Private-Network" in self.headers:
                headers["Access-Control-Allow-Private-Network"] = "true"
        self._send_head(204, headers)

    def _view_fields(self) -> dict[str, list[str]]:
        if self.command != "POST":
            return parse_qs(urlsplit(self.path).query)
        body = parse_json(self._read_body())
        return {name: [value] for name, value in body.items() if isinstance(value, str)}

    def _read_body(self) -> bytes:
        limit = self.server.limits.max_body_bytes
        self._body = Body(self.rfile, self.connection, self.headers, limit)
        try:
            return self._body.read()
        finally:
            self.connection.settimeout(_SOCKET_TIMEOUT_S)

    def _generate(self, *, is_chat: bool) -> None:
        started_s = time.monotonic()
        parse = parse_chat_request if is_chat else parse_completion_request
        request = parse(parse_json(self._read_body()), self.server.defaults)
        self._record.model = request.model or self.server.catalog.base_name
        choice = self.server.catalog.choose(request)
        self._record.task = choice.text
        with self.server.place():
            if not self.server.engine.is_healthy:
                raise APIError(503, "the generation thread has died; restart the server")
            answers = self.server.engine.start(request, choice)
            shape = ResponseShape(
                is_chat=is_chat,
                model=self._record.model,
                token_bytes=(
                    None if request.num_alternatives is None else self.server.engine.token_bytes
                ),
                prompts=request.prompts if request.echo else (),
            )
            try:
                if request.stream:
                    self._send_stream(request, shape, answers)
                else:
                    self._send_whole(shape, answers)
            finally:
                answers.abandon()
                self._note_answers(answers, started_s)
                if (speed := self._record.tokens_per_s) is not None:
                    self.server.engine.seen.note_speed(choice, speed)

    def _note_answers(self, answers: Answers, started_s: float) -> None:
        counts = usage(answers.replies)
        begun = [r.first_token_s for r in answers.replies if r.first_token_s is not None]
        self._record.prompt_tokens = counts["prompt_tokens"]
        self._record.cached_tokens = counts["prompt_tokens_details"]["cached_tokens"]
        self._record.completion_tokens = counts["completion_tokens"]
        self._record.first_token_s = min(begun) - started_s if begun else None
        self._record.elapsed_s = time.monotonic() - started_s
        self._record.finish_reason = answers.replies[0].finish_reason or ""

    def _send_whole(self, shape: ResponseShape, answers: Answers) -> None:
        pieces = answers.pieces(self.server.limits.time_limit_s, self._check_client)
        with contextlib.closing(pieces):
            self._send_json(200, shape.whole(pieces, answers.replies))

    def _send_stream(
        self, request: GenerationRequest, shape: ResponseShape, answers: Answers
    ) -> None:
        pieces = answers.pieces(self.server.limits.time_limit_s, self._check_client)
        with contextlib.closing(pieces):
            # What goes wrong before the first token gets a status of its own.
            first = next(pieces, None)
            self.close_connection = True  # marks the end: the length is not known
            headers = {"Cache-Control": "no-store", "Connection": "close"}
            self._send_head(200, {"Content-Type": "text/event-stream; charset=utf-8", **headers})
            for reply in answers.replies:
                if (opening := shape.opening(reply)) is not None:
                    self._send_event(opening)
            for reply, piece in itertools.chain(() if first is None else (first,), pieces):
                for event in shape.pieces(reply, piece):
                    self._send_event(event)
        for reply in answers.replies:
            self._send_event(shape.closing(reply))
        if request.include_usage:
            self._send_event(shape.token_counts(answers.replies))
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
        self, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        self._send(status, "application/json", json.dumps(body).encode(), headers or {})

    def _send(
        self, status: int, content_type: str, raw: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        described = {"Content-Type": content_type, "Content-Length": str(len(raw))}
        self._send_head(status, {**described, **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _send_head(self, status: int, headers: Mapping[str, str]) -> None:
        self._record.status = status
        self.send_response(status)
        for name, value in {**headers, **self._cors}.items():
            self.send_header(name, value)
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection and "Connection" not in headers:
            self.send_header("Connection", "close")
        self.end_headers()
        self._headers_are_sent = True

    def _send_error(self, error: APIError) -> None:
        self._record.status, self._record.error = error.status, error.message
        with contextlib.suppress(ConnectionError, TimeoutError):
            if self._headers_are_sent:  # in the middle of a stream
                self._send_event(error.body())
                return
            if self.command == "POST" and (self._body is None or not self._body.is_read):
                self.close_connection = True  # what follows on this connection is not a request
            self._send_json(error.status, error.body(), error.headers)
