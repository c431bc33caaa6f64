"""A WSGI environ, as the ASGI scope that the authenticators and resolvers read."""

from __future__ import annotations

from typing import Any

from starlette.types import Scope

_BARE_HEADERS = {"CONTENT_TYPE": b"content-type", "CONTENT_LENGTH": b"content-length"}  # the others begin with HTTP_


def scope_of(environ: dict[str, Any]) -> Scope:
    """Return the scope of a request.

    A header that was sent twice is one by now: a server joins them with a comma, so that two keys are no key.
    """
    root = _decoded(environ.get("SCRIPT_NAME", ""))
    raw = str(environ.get("RAW_URI") or environ.get("REQUEST_URI") or "").partition("?")[0]
    client = environ.get("REMOTE_ADDR")
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": str(environ.get("SERVER_PROTOCOL", "HTTP/1.1")).partition("/")[2],
        "method": environ["REQUEST_METHOD"],
        "scheme": environ.get("wsgi.url_scheme", "http"),
        "root_path": root,
        "path": root + _decoded(environ.get("PATH_INFO", "")),
        "query_string": environ.get("QUERY_STRING", "").encode("latin-1"),
        "headers": list(_headers(environ)),
        "client": (client, _port(environ.get("REMOTE_PORT"))) if client else None,
        "server": (environ.get("SERVER_NAME", ""), _port(environ.get("SERVER_PORT"))),
        "wsgi.environ": environ,
    }
    if raw.startswith("/"):
        scope["raw_path"] = raw.encode("latin-1", "replace")
    return scope


def adapt(environ: dict[str, Any], scope: Scope) -> None:
    """Change ``environ`` as resolvers have changed ``scope``: a prefix with the tenant goes to ``SCRIPT_NAME``."""
    root = scope["root_path"]
    if root == _decoded(environ.get("SCRIPT_NAME", "")):
        return  # and a path that is no UTF-8 stays as the client sent it
    environ["SCRIPT_NAME"], environ["PATH_INFO"] = _encoded(root), _encoded(scope["path"][len(root) :])


def _headers(environ: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    found = []
    for name, value in environ.items():
        if name.startswith("HTTP_"):
            found.append((name[5:].replace("_", "-").lower().encode("latin-1"), str(value).encode("latin-1")))
        elif name in _BARE_HEADERS and value:
            found.append((_BARE_HEADERS[name], str(value).encode("latin-1")))
    return found


def _decoded(text: str) -> str:
    # PEP 3333: each character stands for a byte
    return text.encode("latin-1").decode("utf-8", "replace")


def _encoded(text: str) -> str:
    return text.encode("utf-8").decode("latin-1")


def _port(text: object) -> int:
    return int(text) if isinstance(text, str) and text.isdigit() else 0


__all__ = ["adapt", "scope_of"]
