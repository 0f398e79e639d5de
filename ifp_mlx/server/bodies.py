"""Request bodies: read whole, within a size and a time, whether their length is said or not."""

import contextlib
import socket
import time
from email.message import Message
from io import BufferedIOBase

from ifp_mlx.server.api_error import APIError

_TIME_LIMIT_S = 30.0
_MAX_DISCARDED_BYTES = 64 * 2**20
_PART_BYTES = 2**16


class Body:
    """The body of one request.

    Args:
        stream: where it comes from, right after the headers.
        connection: of the stream.
        headers: of the request.
        max_bytes: a longer one is refused.

    Attributes:
        is_read: nothing of it is left on the connection.
    """

    def __init__(
        self, stream: BufferedIOBase, connection: socket.socket, headers: Message, max_bytes: int
    ):
        self.is_read = False
        self._stream = stream
        self._connection = connection
        self._headers = headers
        self._max_bytes = max_bytes
        self._deadline = time.monotonic() + _TIME_LIMIT_S

    def read(self) -> bytes:
        """Return the body.

        Raises:
            APIError: 411, 413 or 415: no usable length, too large, not JSON as it is.
            TimeoutError: it does not come.
            ConnectionError: the client went away.
        """
        # A browser asks before it sends this type to another site, which a form cannot.
        if self._headers.get_content_type() != "application/json":
            raise APIError(415, "the body must have the content type application/json")
        encoding = self._headers.get("Content-Encoding", "identity").strip().lower()
        if encoding != "identity":
            raise APIError(415, f"the body must not be compressed, and this is {encoding[:20]!r}")
        is_chunked = "Transfer-Encoding" in self._headers
        raw = self._read_chunks() if is_chunked else self._read_length()
        self.is_read = True
        return raw

    def _read_length(self) -> bytes:
        text = self._headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise APIError(411, "the request has no usable Content-Length")
        length = int(text)
        if length > self._max_bytes:
            self._discard(length)
            raise self._too_large(f"{length} bytes")
        return self._read_exactly(length)

    def _read_chunks(self) -> bytes:
        coding = self._headers.get("Transfer-Encoding", "").strip().lower()
        if coding != "chunked" or "Content-Length" in self._headers:
            raise APIError(411, "the body must have a Content-Length, or come in chunks")
        parts, num_bytes = [], 0
        while length := self._chunk_length():
            num_bytes += length
            if num_bytes > self._max_bytes:
                raise self._too_large("more bytes")
            parts.append(self._read_exactly(length))
            if self._read_line() != b"":
                raise APIError(400, "the body's chunks do not have the length that they name")
        while self._read_line():  # trailing headers, of no use
            pass
        return b"".join(parts)

    def _chunk_length(self) -> int:
        digits = self._read_line().split(b";")[0].strip()
        try:
            if not digits or len(digits) > 15 or not digits.isalnum():
                raise ValueError
            return int(digits, 16)
        except ValueError as error:
            raise APIError(400, "the body's chunks have no usable length") from error

    def _read_line(self) -> bytes:
        self._check_time()
        line = self._stream.readline(1024)
        if not line.endswith(b"\n"):
            if len(line) < 1024:
                raise ConnectionError("the body ended early")
            raise APIError(400, "the body's chunks have no usable length")
        return line.rstrip(b"\r\n")

    def _read_exactly(self, length: int) -> bytes:
        parts = []
        while length:
            self._check_time()
            part = self._stream.read1(min(length, _PART_BYTES))
            if not part:
                raise ConnectionError("the body ended early")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _check_time(self) -> None:
        """Limit the whole body's time: the socket's own timeout is for each part alone."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._connection.settimeout(left_s)

    def _discard(self, length: int) -> None:
        """Read a body to throw it away: clients look for an answer when they have sent all."""
        if length > _MAX_DISCARDED_BYTES:
            return
        with contextlib.suppress(ConnectionError, TimeoutError):
            while length:
                self._check_time()
                part = self._stream.read1(min(length, _PART_BYTES))
                if not part:
                    return
                length -= len(part)
            self.is_read = True

    def _too_large(self, size: str) -> APIError:
        return APIError(413, f"the body has {size}, the limit is {self._max_bytes}")
