"""Authenticators: turn what a request carries into a ``Credential``.

The middleware asks them in order. Each leaves alone what is not its own, and returns None; what is its own and not
valid it refuses, and no further one is asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

from starlette.requests import HTTPConnection
from starlette.types import Scope

from ..authentication.credential import Credential
from .resolvers import Headers


@runtime_checkable
class Authenticator(Protocol):
    """Finds the credential of a request; for the application's own logins, a session cookie for example."""

    async def authenticate(self, connection: HTTPConnection) -> Credential | None:
        """Return the request's credential, or None where it carries none of this kind.

        Called for every request that is not exempt, so it should be quick. The tenants that the credential allows are
        looked up, and cached, by the middleware.

        Raises:
            InvalidCredentialError: it carries one that is not valid; the request is refused by 401.
        """


class Presented(NamedTuple):
    """The text of a credential as a request carries it, and whether the browser sends it by itself (a cookie)."""

    text: str
    sent_by_browser: bool = False


class TextAuthenticator(ABC):
    """An authenticator of texts that can be told apart before they are checked, and checked without the request.

    ``headers`` lists the headers that it reads, as lower-case bytes; a request with one of them twice is refused.
    """

    headers: tuple[bytes, ...] = ()

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

    async def authenticate(self, connection: HTTPConnection) -> Credential | None:
        """Return the request's credential, as an ``Authenticator`` does."""
        found = {name: value for name, value in connection.scope["headers"] if name in self.headers}
        presented = self.read(connection.scope, found)
        return None if presented is None else self.peek(presented) or await self.verify(presented)
