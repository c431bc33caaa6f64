"""Secrets in HashiCorp Vault (or OpenBao): the key-value engine, version 2, and the transit engine. Extra ``vault``.

hvac is synchronous, so every call runs in a worker thread; each is bounded by the connection's ``timeout``.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigurationError, MissingExtraError, SecretNotFoundError, SecretProviderError
from .providers import check_name, encode_context, without_payload_logs


class VaultConnection:
    """A connection to Vault and its login, shared by ``VaultSecrets`` and ``VaultTransit``.

    Give a ``token``, or a ``role_id`` and ``secret_id`` of the AppRole method: with those, a new login replaces a token
    that has expired.

    Args:
        url: Vault's address.
        token: A token.
        role_id: The AppRole's id.
        secret_id: Its secret.
        auth_mount: Where the AppRole method is mounted.
        namespace: The namespace (Vault Enterprise, OpenBao).
        verify: Whether to verify Vault's certificate, or the path of a CA bundle to verify it with.
        timeout: Seconds one request may take.

    Raises:
        MissingExtraError: hvac is not installed.
        ConfigurationError: neither or both ways to log in are given.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        role_id: str | None = None,
        secret_id: str | None = None,
        auth_mount: str = "approle",
        namespace: str | None = None,
        verify: bool | str = True,
        timeout: float = 5.0,
    ) -> None:
        try:
            import hvac
        except ModuleNotFoundError as exc:
            raise MissingExtraError("hvac", "vault") from exc
        if (token is None) == (role_id is None):
            raise ConfigurationError("give VaultConnection a token, or a role_id (and its secret_id)")
        self._url = url
        self._role_id = role_id
        self._secret_id = secret_id
        self._auth_mount = auth_mount
        self._client: Any = hvac.Client(
            url=url,
            # not None, for which hvac would look into the environment and the user's home
            token=token or "",
            namespace=namespace,
            verify=verify,
            timeout=timeout,
            allow_redirects=False,
        )
        # locked while logging in, so that concurrent calls log in once
        self._login = asyncio.Lock()

    def __repr__(self) -> str:
        """Name the address."""
        return f"VaultConnection({self._url!r})"

    async def call(self, request: Callable[[Any], Any], *field: str, missing: SecretNotFoundError) -> Any:
        """Run ``request`` on the hvac client, and again after a new login if the token has expired.

        Returns:
            The part of the answer that the names in ``field`` lead to, one in the other.

        Raises:
            SecretNotFoundError: ``missing``, if Vault does not have it.
            SecretProviderError: Vault does not answer, or refuses, or the answer is not Vault's.
        """
        answer = await self._ask(request, missing)
        for name in field:
            if not isinstance(answer, Mapping) or name not in answer:
                raise SecretProviderError(f"the answer from {self._url} is not Vault's: {name!r} is missing")
            answer = answer[name]
        return answer

    async def _ask(self, request: Callable[[Any], Any], missing: SecretNotFoundError) -> Any:
        used = self._client.token
        if self._role_id is not None and not used:
            await self._log_in(used)
            used = self._client.token
        try:
            return await self._run(request, missing)
        except _ForbiddenError as exc:
            # If the policy refuses the request, it would refuse a new token too. But a valid token may itself be new,
            # from another call's login.
            if self._role_id is None or (await self._is_valid() and self._client.token == used):
                raise SecretProviderError(str(exc)) from None
        await self._log_in(used)
        try:
            return await self._run(request, missing)
        except _ForbiddenError as exc:
            raise SecretProviderError(str(exc)) from None

    async def close(self) -> None:
        """Close the HTTP session."""
        await asyncio.to_thread(self._client.adapter.close)

    async def _is_valid(self) -> bool:
        """Whether the token is valid. The default policy lets every token look itself up."""
        try:
            await self._run(
                lambda client: client.auth.token.lookup_self(), SecretNotFoundError("auth/token", self._url)
            )
        except _ForbiddenError:
            return False
        return True

    async def _log_in(self, refused: str) -> None:
        async with self._login:
            if self._client.token != refused:
                return  # another call has just logged in

            def log_in(client: Any) -> None:
                client.auth.approle.login(
                    role_id=self._role_id, secret_id=self._secret_id, mount_point=self._auth_mount
                )

            try:
                await self._run(log_in, SecretNotFoundError(self._auth_mount, self._url))
            except _ForbiddenError as exc:
                raise SecretProviderError(f"the login by AppRole failed: {exc}") from None

    async def _run(self, request: Callable[[Any], Any], missing: SecretNotFoundError) -> Any:
        import hvac.exceptions
        import requests

        try:
            with without_payload_logs():
                return await asyncio.to_thread(request, self._client)
        except hvac.exceptions.InvalidPath:
            raise missing from None
        except hvac.exceptions.Forbidden:
            raise _ForbiddenError(
                f"Vault at {self._url} refuses: the token is not valid, or its policy does not allow this"
            ) from None
        except (hvac.exceptions.VaultError, requests.RequestException) as exc:
            # the class alone: a message may quote the request, which contains the token or a secret
            raise SecretProviderError(f"Vault at {self._url} is not available: {type(exc).__name__}") from None
        except (AttributeError, KeyError, TypeError):
            # hvac parses the answer to a login; a redirect or a page of HTML has no token
            raise SecretProviderError(f"the answer from {self._url} is not Vault's") from None


class _ForbiddenError(SecretProviderError):
    """The token is refused: it may have expired."""


class VaultSecrets:
    """Secrets in Vault's key-value engine, version 2: each is the field ``value`` of ``<path>/<name>``.

    Args:
        connection: The connection to Vault.
        path: The path below the mount.
        mount: Where the engine is mounted.
        field: The field that holds the secret.
    """

    def __init__(
        self, connection: VaultConnection, *, path: str = "tenancy", mount: str = "secret", field: str = "value"
    ) -> None:
        self._connection = connection
        self._path = path.strip("/")
        self._mount = mount
        self._field = field

    def __repr__(self) -> str:
        """Name the path."""
        return f"VaultSecrets({self._connection!r}, {self._mount}/{self._path})"

    async def read(self, name: str) -> str:
        """Return the newest version of a secret.

        Raises:
            SecretNotFoundError: there is none, it is deleted, or it lacks the field.
            SecretProviderError: Vault does not answer, or refuses.
        """
        path = f"{self._path}/{check_name(name)}"
        missing = SecretNotFoundError(name, f"Vault, {self._mount}/{path}")

        def request(client: Any) -> Any:
            return client.secrets.kv.v2.read_secret_version(
                path=path, mount_point=self._mount, raise_on_deleted_version=True
            )

        fields = await self._connection.call(request, "data", "data", missing=missing)
        value = fields.get(self._field) if isinstance(fields, Mapping) else None
        if not isinstance(value, str):
            raise missing
        return value

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()


class VaultTransit:
    """Wraps keys with Vault's transit engine, in a key that never leaves Vault.

    The transit key must be of an AEAD type (``aes256-gcm96``, the default, or ``chacha20-poly1305``), which binds what
    it encrypts to its context. It can be rotated in Vault: what it wrapped before still unwraps.

    Args:
        connection: The connection to Vault.
        key: The name of the transit key.
        mount: Where the engine is mounted.
    """

    def __init__(self, connection: VaultConnection, *, key: str = "tenancy", mount: str = "transit") -> None:
        self._connection = connection
        self._key = check_name(key)
        self._mount = mount

    def __repr__(self) -> str:
        """Name the key."""
        return f"VaultTransit({self._connection!r}, {self.name})"

    @property
    def name(self) -> str:
        """``vault:``, the mount and the key."""
        return f"vault:{self._mount}/{self._key}"

    async def wrap(self, key: bytes, *, context: Mapping[str, str]) -> bytes:
        """Encrypt ``key``.

        Raises:
            SecretProviderError: Vault does not answer, or refuses.
        """
        arguments = {**self._arguments(context), "plaintext": base64.b64encode(key).decode()}
        wrapped = await self._call(lambda client: client.secrets.transit.encrypt_data(**arguments), "ciphertext")
        return wrapped.encode()

    async def unwrap(self, wrapped: bytes, *, context: Mapping[str, str]) -> bytes:
        """Decrypt what ``wrap`` made.

        Raises:
            SecretProviderError: Vault does not answer, or refuses, for example because the context or key is another.
        """
        arguments = {**self._arguments(context), "ciphertext": wrapped.decode("ascii", "replace")}
        text = await self._call(lambda client: client.secrets.transit.decrypt_data(**arguments), "plaintext")
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            raise SecretProviderError(f"{self.name} returned a key that is not base64") from None

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    def _arguments(self, context: Mapping[str, str]) -> dict[str, str]:
        associated = base64.b64encode(encode_context(context)).decode()
        return {"name": self._key, "mount_point": self._mount, "associated_data": associated}

    async def _call(self, request: Callable[[Any], Any], field: str) -> str:
        missing = SecretNotFoundError(self._key, f"Vault, {self._mount}")
        return str(await self._connection.call(request, "data", field, missing=missing))


__all__ = ["VaultConnection", "VaultSecrets", "VaultTransit"]
