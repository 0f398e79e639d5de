"""Who may use the server: hosts that it goes by, web pages that may call it, a key."""

import dataclasses
import hmac
import ipaddress
import re
import socket
from email.message import Message
from urllib.parse import urlsplit

from ifp_mlx.errors import UsageError
from ifp_mlx.server.api_error import APIError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
"""Names that nobody can register, so that no web site can make them point here."""


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may use the server.

    Attributes:
        api_key: what clients must send as a bearer token; None asks for none.
        allowed_origins: web pages of these origins, such as ``https://example.org``, may use it;
            ``*`` is any. Its own page always may.
        allowed_hosts: further names that it goes by; ``*`` is any. Addresses, this machine's name
            and names that are local by definition always are.
    """

    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise UsageError(
                    f"{origin!r} is no origin; write scheme and host alone, as in "
                    "https://example.org or http://localhost:3000"
                )

    def check_host(self, headers: Message) -> None:
        """Refuse a name that is not the server's.

        A web site can make its own name point to this machine, and its pages then count as the
        server's. They cannot choose the name that the browser sends.

        Raises:
            APIError: 403.
        """
        host = headers.get("Host")
        if host is None or "*" in self.allowed_hosts:  # browsers always send it
            return
        name = _host_name(host)
        if name in self.allowed_hosts or _is_local(name):
            return
        raise APIError(
            403,
            f"this server does not go by the name {name!r}; start it with --allowed-hosts {name} "
            "if it should",
            code="host_not_allowed",
        )

    def cors_headers(self, headers: Message) -> dict[str, str]:
        """Return what lets the page that sent a request read the answer.

        Raises:
            APIError: 403, the page may not use the server.
        """
        origin = headers.get("Origin")
        if origin is None:
            return {}
        if "*" in self.allowed_origins:
            return {"Access-Control-Allow-Origin": "*"}
        if origin in self.allowed_origins:
            return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if origin.partition("://")[2] == headers.get("Host"):  # the server's own page
            return {}
        raise APIError(
            403,
            f"web pages from {origin!r} may not use this server; start it with --allowed-origins "
            f"{origin} if they should",
            code="origin_not_allowed",
        )

    def check_key(self, headers: Message) -> None:
        """Refuse a missing or wrong key.

        Raises:
            APIError: 401.
        """
        if self.api_key is None:
            return
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        matches = hmac.compare_digest(given.strip().encode(), self.api_key.encode())
        if scheme.lower() != "bearer" or not matches:
            raise APIError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _host_name(host: str) -> str:
    """Return the name or address in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return host


def _is_local(name: str) -> bool:
    if name == "localhost" or name.endswith(_LOCAL_SUFFIXES):
        return True
    if name == socket.gethostname().lower():
        return True
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
