"""What the middleware reads of a WSGI environ, and what it changes of it."""

from __future__ import annotations

from typing import Any

import pytest

from tenancy_orm.wsgi.environ import adapt, scope_of


def environ(**variables: Any) -> dict[str, Any]:
    """An environ with what PEP 3333 demands."""
    return {"REQUEST_METHOD": "GET", "SERVER_NAME": "acme.example", "SERVER_PORT": "80", **variables}


def test_a_scope_says_what_the_environ_says() -> None:
    """Paths are decoded, headers have ASGI's names, and ports are numbers."""
    given = environ(
        REQUEST_METHOD="POST",
        SCRIPT_NAME="/app",
        PATH_INFO="/caf\xc3\xa9",
        QUERY_STRING="a=1",
        RAW_URI="/app/caf%C3%A9?a=1",
        SERVER_PROTOCOL="HTTP/1.0",
        REMOTE_ADDR="192.0.2.1",
        REMOTE_PORT="4711",
        CONTENT_TYPE="text/plain",
        CONTENT_LENGTH="",
        HTTP_X_API_KEY="key",
        **{"wsgi.url_scheme": "https"},
    )
    assert scope_of(given) == {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.0",
        "method": "POST",
        "scheme": "https",
        "root_path": "/app",
        "path": "/app/café",
        "raw_path": b"/app/caf%C3%A9",
        "query_string": b"a=1",
        "headers": [(b"content-type", b"text/plain"), (b"x-api-key", b"key")],
        "client": ("192.0.2.1", 4711),
        "server": ("acme.example", 80),
        "wsgi.environ": given,
    }


@pytest.mark.parametrize("port", ["", "-1", "8o", None], ids=repr)
def test_what_a_server_leaves_out_is_missing_in_the_scope(port: str | None) -> None:
    """No address of the client, no path as it was sent, and no port."""
    scope = scope_of(environ(SERVER_PORT=port, RAW_URI="*"))
    assert (scope["client"], scope["server"], "raw_path" in scope) == (None, ("acme.example", 0), False)
    assert (scope["path"], scope["query_string"], scope["headers"]) == ("", b"", [])


def test_a_prefix_goes_to_the_script_name() -> None:
    """As bytes in characters, whatever the tenant's prefix and the rest of the path are."""
    given = environ(PATH_INFO="/t/acme/caf\xc3\xa9")
    scope = scope_of(given)
    scope["root_path"] = "/t/acme"
    adapt(given, scope)
    assert (given["SCRIPT_NAME"], given["PATH_INFO"]) == ("/t/acme", "/caf\xc3\xa9")


def test_a_path_without_a_prefix_stays_as_it_was_sent() -> None:
    """Also one that is no UTF-8: read as text, its bytes are lost."""
    given = environ(PATH_INFO="/caf\xe9")
    adapt(given, scope_of(given))
    assert (given.get("SCRIPT_NAME"), given["PATH_INFO"]) == (None, "/caf\xe9")
