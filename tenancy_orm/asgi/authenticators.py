"""Authenticators: turn what a request carries into a ``Credential``.

The middleware asks them in order. Each leaves alone what is not its own, and returns None; what is its own and not
valid it refuses, and no further one is asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from starlette.requests import HTTPConnection
from starlette.types import Scope

from ..authentication.credential import Credential
from ..authentication.directory import Directory
from ..errors import ConfigurationError, InvalidCredentialError
from .resolvers import ApiKeyHeader, BearerToken, Headers, KeyResolver


@runtime_checkable
class Authenticator(Protocol):
    """Finds the credential of a request; for the application's own logins, a session cookie for example."""

    async def authenticate(self, connection: HTTPConnection, /) -> Credential | None:
        """Return the request's credential, or None where it carries none of this kind.

        Called for every request that is not exempt, so it should be quick. The tenants that the credential allows are
        looked up, and cached, by the middleware.

        Raises:
            InvalidCredentialError: it carries one that is not valid; the request is refused by 401.
        """


class ApiKeyAuthenticator:
    """Finds API keys; among the authenticators by default, and the only one where none are given.

    Args:
        resolvers: Where keys are sent; in ``X-API-Key`` and ``Authorization: Bearer`` where none are given.

    Raises:
        ConfigurationError: one is no ``KeyResolver``.
    """

    def __init__(self, *resolvers: KeyResolver) -> None:
        given: tuple[object, ...] = resolvers
        if unknown := [resolver for resolver in given if not isinstance(resolver, KeyResolver)]:
            raise ConfigurationError(f"{unknown[0]!r} is not a KeyResolver")
        self.resolvers = resolvers or (ApiKeyHeader(), BearerToken())
        self.headers = tuple({header for resolver in self.resolvers for header in resolver.headers})
        # with the header that each reads, where it reads one alone: most requests send the key in one of them only
        self._readers = tuple((r.headers[0] if len(r.headers) == 1 else None, r) for r in self.resolvers)

    def read(self, scope: Scope, headers: Headers, directory: Directory) -> str | None:
        """Return the text that was sent where keys are; None where nothing was.

        Beside a key a proxy may send a token of another system: of two texts the one that is a key is returned.

        Raises:
            InvalidCredentialError: there is more than one key.
        """
        found = None
        for header, resolver in self._readers:
            if header is not None and header not in headers:
                continue
            text = resolver.key(scope, headers)
            if text is None or text == found:
                continue
            if found is None:
                found = text
            elif directory.is_key(text):
                if directory.is_key(found):
                    raise InvalidCredentialError("ambiguous")
                found = text
        return found


class Presented(NamedTuple):
    """The text of a credential as a request carries it, and whether the browser sends it by itself (a cookie)."""

    text: str
    sent_by_browser: bool = False


class TextAuthenticator(ABC):
    """An authenticator of texts that can be told apart before they are checked, and checked without the request.

    ``headers`` lists the headers that it reads, as lower-case bytes; a request with one of them twice is refused.
    ``issuer`` names who issues what it reads, and ``subject_prefix`` is put before the subjects: two issuers may call
    two people by the same one. The middleware refuses a subject that begins with the longer prefix of another.
    """

    headers: tuple[bytes, ...] = ()
    issuer = ""
    subject_prefix = ""

    @abstractmethod
    def read(self, scope: Scope, headers: Headers) -> Presented | None:
        """Return the text that is this authenticator's own, whether or not it is valid; else None.

        Raises:
            InvalidCredentialError: there are several.
        """

    @abstractmethod
    def peek(self, presented: Presented) -> Credential | None:
        """Return the credential if it was verified before and has not expired; on None call ``verify``. No I/O."""

    @abstractmethod
    async def verify(self, presented: Presented) -> Credential:
        """Verify it.

        Raises:
            InvalidCredentialError: it is not valid.
            CredentialsUnavailableError: it cannot be verified now.
        """

    def on_withdrawal(self, callback: Callable[[], None]) -> None:  # noqa: B027 - most have nothing to withdraw
        """Call ``callback``, in the event loop, when credentials that it has verified may not hold any more.

        What they have open is then verified: each is asked whether it ``holds``. Does nothing by default.
        """

    async def authenticate(self, connection: HTTPConnection) -> Credential | None:
        """Return the request's credential, as an ``Authenticator`` does."""
        found = {name: value for name, value in connection.scope["headers"] if name in self.headers}
        presented = self.read(connection.scope, found)
        return None if presented is None else self.peek(presented) or await self.verify(presented)
