"""A server that speaks as much of HashiCorp Vault's HTTP API as the providers use, on loopback."""

from __future__ import annotations

import base64
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


class FakeVault:
    """Tokens, AppRole, the key-value engine (version 2) and the transit engine.

    ``tokens`` are those that are admitted; ``stored`` maps paths of the engine ``secret`` to their fields, or to None
    where they are deleted; ``denied`` are paths that no policy admits; ``odd``, where it is set, is the status and the
    body of every answer; ``requests`` is what was asked for.
    """

    def __init__(self) -> None:
        self.tokens = {"root"}
        self.role = ("role-1", "secret-1")
        self.stored: dict[str, dict[str, str] | None] = {}
        self.requests: list[str] = []
        self.denied: set[str] = set()
        self.odd: tuple[int, Any] | None = None
        self.sealed = False
        self.logins = 0
        self.delay = threading.Event()
        self.delay.set()
        self._transit: dict[str, AESGCM] = {}
        self.url = ""

    def answer(self, method: str, path: str, token: str | None, body: dict[str, Any]) -> tuple[int, Any]:
        """Answer one request."""
        self.requests.append(f"{method} {path}")
        self.delay.wait(10)
        if self.odd is not None:
            return self.odd
        if self.sealed:
            return 503, {"errors": ["Vault is sealed"]}
        if path == "auth/approle/login":
            return self._log_in(body)
        if token not in self.tokens or path in self.denied:
            return 403, {"errors": ["permission denied"]}
        if path == "auth/token/lookup-self":
            return 200, {"data": {"ttl": 60}}
        kind, _, rest = path.partition("/")
        if kind == "secret" and rest.startswith("data/"):
            return self._read(rest.removeprefix("data/"))
        if kind == "transit":
            verb, _, name = rest.partition("/")
            return self._encrypt(name, body) if verb == "encrypt" else self._decrypt(name, body)
        return 404, {"errors": []}

    def _log_in(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.logins += 1
        if (body.get("role_id"), body.get("secret_id")) != self.role:
            return 400, {"errors": ["invalid role or secret ID"]}
        token = secrets.token_hex(8)
        self.tokens.add(token)
        return 200, {"auth": {"client_token": token, "lease_duration": 60, "renewable": True}}

    def _read(self, path: str) -> tuple[int, dict[str, Any]]:
        if path not in self.stored:
            return 404, {"errors": []}
        fields = self.stored[path]
        metadata = {"version": 1, "deletion_time": "" if fields is not None else "2030-01-01T00:00:00Z"}
        return (200 if fields is not None else 404), {"data": {"data": fields, "metadata": metadata}}

    def _encrypt(self, name: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        cipher = self._transit.setdefault(name, AESGCM(secrets.token_bytes(32)))
        nonce = secrets.token_bytes(12)
        sealed = cipher.encrypt(nonce, base64.b64decode(body["plaintext"]), _associated(body))
        return 200, {"data": {"ciphertext": "vault:v1:" + base64.b64encode(nonce + sealed).decode()}}

    def _decrypt(self, name: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        version, _, text = str(body["ciphertext"]).rpartition(":")
        if version != "vault:v1" or name not in self._transit:
            return 400, {"errors": ["invalid ciphertext: no prefix"]}
        raw = base64.b64decode(text)
        try:
            plain = self._transit[name].decrypt(raw[:12], raw[12:], _associated(body))
        except InvalidTag:
            return 400, {"errors": ["cipher: message authentication failed"]}
        return 200, {"data": {"plaintext": base64.b64encode(plain).decode()}}


def _associated(body: dict[str, Any]) -> bytes:
    return base64.b64decode(body.get("associated_data", ""))


@contextmanager
def fake_vault() -> Iterator[FakeVault]:
    """Serve a ``FakeVault``."""
    vault = FakeVault()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            path = self.path.partition("?")[0].removeprefix("/v1/")
            status, answer = vault.answer(self.command, path, self.headers.get("X-Vault-Token"), body)
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            if status == 307:
                self.send_header("Location", "/v1/elsewhere")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - names that http.server calls

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    vault.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield vault
    finally:
        vault.delay.set()
        server.shutdown()
        server.server_close()
        thread.join()
