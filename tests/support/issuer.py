"""A local identity provider: signs tokens, publishes and rotates its keys, stops, answers slowly, and lies."""

from __future__ import annotations

import base64
import functools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

AUDIENCE = "https://api.example.com"


@functools.cache
def rsa_key(number: int, bits: int = 2048) -> rsa.RSAPrivateKey:
    """A key; the same for the same number, since making one takes a tenth of a second."""
    return rsa.generate_private_key(65537, bits)


def public_jwk(key: rsa.RSAPrivateKey, kid: str | None) -> dict[str, Any]:
    """The public part, as an issuer publishes it."""
    published: dict[str, Any] = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    published.pop("key_ops")
    return {**published, "use": "sig", "alg": "RS256", **({} if kid is None else {"kid": kid})}


def public_pem(key: rsa.RSAPrivateKey) -> str:
    """The public part in PEM."""
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(encoding, form).decode()


def encode(part: object) -> str:
    """One part of a token: an object as JSON, or bytes, in base64url."""
    raw = part if isinstance(part, bytes) else json.dumps(part, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _without_none(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


class Signer:
    """Signs tokens as an issuer does, and knows what it publishes.

    Args:
        url: The ``iss`` of its tokens.
        audience: Their ``aud``.
    """

    def __init__(self, url: str, audience: str = AUDIENCE) -> None:
        self.url = url
        self.audience = audience
        self.number = 0
        self.retired: list[int] = []

    @property
    def kid(self) -> str:
        """The id of the key that signs now."""
        return f"key-{self.number}"

    @property
    def key(self) -> rsa.RSAPrivateKey:
        """The key that signs now."""
        return rsa_key(self.number)

    def jwks(self) -> dict[str, Any]:
        """The keys that it publishes."""
        return {"keys": [public_jwk(rsa_key(number), f"key-{number}") for number in (self.number, *self.retired)]}

    def rotate(self, *, keep: bool = True) -> None:
        """Sign with another key from now on; the old one stays published, or does not."""
        self.retired = [self.number, *self.retired] if keep else []
        self.number += 1

    def claims(self, **claims: Any) -> dict[str, Any]:
        """The claims of a token that is valid for five minutes; None leaves one out."""
        now = int(time.time())
        usual = {"iss": self.url, "aud": self.audience, "iat": now, "exp": now + 300, "sub": "alice"}
        return _without_none({**usual, **claims})

    def token(self, *, headers: Mapping[str, Any] | None = None, **claims: Any) -> str:
        """Sign a token; a claim or a header that is None is left out."""
        return self.sign(self.claims(**claims), headers=headers)

    def sign(self, claims: Mapping[str, Any] | bytes, *, headers: Mapping[str, Any] | bytes | None = None) -> str:
        """Sign what is given, whatever it is, with RS256."""
        usual = {"alg": "RS256", "typ": "JWT", "kid": self.kid}
        header = headers if isinstance(headers, bytes) else _without_none({**usual, **(headers or {})})
        signed = f"{encode(header)}.{encode(claims)}"
        return f"{signed}.{encode(RSAAlgorithm(RSAAlgorithm.SHA256).sign(signed.encode(), self.key))}"


class Issuer(Signer):
    """A ``Signer`` that publishes its keys on loopback, by uvicorn in a thread.

    ``counts`` has how often each path was asked for. Set ``lies`` to what the discovery document says besides or
    instead, ``published`` to what the keys' address answers, ``odd`` to the status, the body and the headers of every
    answer, ``headers`` to further headers; clear ``gate`` to keep every answer back until it is set.

    Args:
        audience: The ``aud`` of its tokens.
        certificate: A file with a certificate and its key, to serve https.
    """

    def __init__(self, audience: str = AUDIENCE, *, certificate: Path | None = None) -> None:
        self._port = 0
        self._certificate = certificate
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self.counts: Counter[str] = Counter()
        self.lies: dict[str, Any] = {}
        self.odd: tuple[int, bytes, dict[str, str]] | None = None
        self.published: Any = None
        self.headers: dict[str, str] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.start()
        scheme = "http" if certificate is None else "https"
        super().__init__(f"{scheme}://127.0.0.1:{self._port}/", audience)

    def start(self) -> None:
        """Serve, at the same address as before."""
        listening = socket.create_server(("127.0.0.1", self._port))  # connections wait until the server accepts them
        self._port = listening.getsockname()[1]
        routes = [Route("/.well-known/openid-configuration", self._discovery), Route("/jwks", self._jwks)]
        app = Starlette(routes=[*routes, Route("/{path:path}", self._jwks)])
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
            ssl_certfile=self._certificate,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop serving: connections are refused."""
        if self._server is None or self._thread is None:
            return
        self.gate.set()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)  # told to stop before it has started, it would not close the socket
        self._server.should_exit = True
        self._thread.join()
        self._server = self._thread = None

    @property
    def fetches(self) -> int:
        """How often its keys were asked for."""
        return self.counts["/jwks"]

    def __enter__(self) -> Self:
        """Serve already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    # in threads, since they are not async: a gate that is closed keeps back its own answer alone
    def _discovery(self, request: Request) -> Response:
        return self._answer(request, {"issuer": self.url, "jwks_uri": f"{self.url}jwks", **self.lies})

    def _jwks(self, request: Request) -> Response:
        return self._answer(request, self.jwks() if self.published is None else self.published)

    def _answer(self, request: Request, document: object) -> Response:
        self.counts[request.url.path] += 1
        self.gate.wait(10)
        if self.odd is not None:
            status, body, headers = self.odd
            return Response(body, status, headers)
        return JSONResponse(document, headers=self.headers)
