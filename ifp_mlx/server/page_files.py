"""The page at ``/``: files that are served as they are."""

from importlib.resources import files

from ifp_mlx.server.content import Content

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing but what this server sends is loaded, run or asked; pictures come as blobs, since an
    # address cannot carry the key.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_files() -> dict[str, Content]:
    """Return the page's files by path: ``/``, and ``/page/NAME`` for what it is made of."""
    served = {}
    for file in (files("ifp_mlx.server") / "page").iterdir():
        suffix = f".{file.name.rpartition('.')[2]}"
        if suffix in _TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            served[path] = Content(_TYPES[suffix], file.read_bytes(), _HEADERS)
    return served
