"""Providers of secrets: the environment and files here; HashiCorp Vault in ``vault``, AWS in ``aws``.

A ``SecretProvider`` returns secrets by name. A ``KeyWrapper`` never returns its key, but encrypts others with it: the
keys that seal tenants' passwords are useless without it (envelope encryption, see ``data_keys``). Both are protocols,
in ``tenancy_orm.protocols``, that an application can implement.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..config import TenancyConfig
from ..config.values import parse_keys
from ..errors import ConfigurationError, SecretError, SecretNotFoundError, SecretProviderError
from ..protocols import SecretProvider
from .keyring import Keyring

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_MAX_BYTES = 64 * 1024
_KEY_BYTES = 32
_MAX_KEY_ID = 16

# libraries that log requests and answers, or might; their child loggers are included
_LOGGERS = ("botocore", "boto3", "hvac", "requests", "urllib3")
_WITH_PAYLOADS = ("botocore.endpoint", "botocore.parsers", "botocore.auth", "botocore.hooks")
_suppressed: ContextVar[bool] = ContextVar("tenancy_payload_logs_suppressed", default=False)


class _PayloadFilter(logging.Filter):
    """Drops a library's records below WARNING of calls that carry secrets: its DEBUG records quote the payload."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record may be logged."""
        return record.levelno >= logging.WARNING or not _suppressed.get()


_PAYLOAD_FILTER = _PayloadFilter()


@contextmanager
def without_payload_logs() -> Iterator[None]:
    """Keep the payload of calls in the body, in this task and threads that it starts, out of the libraries' logs.

    Other calls of the same libraries are logged as before. A logger's filter does not see its child loggers' records,
    so that the filter is added to each of them.
    """
    for name in (*_WITH_PAYLOADS, *logging.root.manager.loggerDict):
        if name.partition(".")[0] in _LOGGERS:
            logging.getLogger(name).addFilter(_PAYLOAD_FILTER)  # adding it twice has no effect
    token = _suppressed.set(True)
    try:
        yield
    finally:
        _suppressed.reset(token)


def check_name(name: str) -> str:
    """Return ``name`` if every provider can have a secret of that name.

    Raises:
        ConfigurationError: it is not 1 to 128 of letters, digits, dots, hyphens and underscores.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} is not a valid name of a secret: use 1 to 128 letters, digits, dots, hyphens and underscores"
        )
    return name


class EnvironmentSecrets:
    """Secrets in environment variables: ``encryption_keys`` is ``<prefix>ENCRYPTION_KEYS``.

    Args:
        prefix: The prefix of the variables' names.
        environ: The variables; ``os.environ`` by default.
    """

    def __init__(self, prefix: str = "SECRET_", environ: Mapping[str, str] | None = None) -> None:
        self._prefix = prefix
        self._environ = os.environ if environ is None else environ

    def __repr__(self) -> str:
        """Name the prefix."""
        return f"EnvironmentSecrets({self._prefix!r})"

    async def read(self, name: str) -> str:
        """Return the variable's value.

        Raises:
            SecretNotFoundError: it is not set, or empty.
        """
        variable = self._prefix + re.sub(r"[^A-Z0-9]", "_", check_name(name).upper())
        value = self._environ.get(variable)
        if not value:
            raise SecretNotFoundError(name, f"the environment, as {variable}")
        return value

    async def close(self) -> None:
        """Nothing is open."""


class FileSecrets:
    """Secrets in files, each named as its secret, as ``systemd-creds``, Docker and Kubernetes mount them.

    A file that others could read or change is refused, as ssh refuses such a private key. Line ends at the end of a
    file are not part of the secret.

    Args:
        directory: Where the files are.
        allow: Permission bits to accept beyond the owner's: 0o044 for mounts that everyone in a container can read.
    """

    def __init__(self, directory: str | Path, *, allow: int = 0) -> None:
        if allow & 0o022:
            raise ConfigurationError("others must not be able to write a secret; allow may be 0o044 at most")
        self._directory = Path(directory)
        self._refused = 0o077 & ~allow

    def __repr__(self) -> str:
        """Name the directory."""
        return f"FileSecrets({str(self._directory)!r})"

    async def read(self, name: str) -> str:
        """Return the file's text.

        Raises:
            SecretNotFoundError: there is no such file.
            SecretProviderError: it cannot be read, is not a file, or others may read or write it.
        """
        path = self._directory / check_name(name)
        try:
            return await asyncio.to_thread(self._read, path)
        except FileNotFoundError:
            raise SecretNotFoundError(name, str(self._directory)) from None
        except (OSError, UnicodeDecodeError) as exc:
            raise SecretProviderError(f"{path} cannot be read: {type(exc).__name__}") from None

    async def close(self) -> None:
        """Nothing is open."""

    def _read(self, path: Path) -> str:
        # opened first, so that the file that is checked is the one that is read; links are followed, since mounts use
        # them
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor has no path
            self._check(path, os.fstat(descriptor))
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise SecretProviderError(f"{path} is larger than {_MAX_BYTES} bytes")
        return text.decode().rstrip("\r\n")

    def _check(self, path: Path, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise SecretProviderError(f"{path} is not a file")
        if status.st_uid not in (0, os.geteuid()):
            raise SecretProviderError(f"{path} belongs to neither this user nor root")
        if status.st_mode & self._refused:
            mode = stat.S_IMODE(status.st_mode)
            raise SecretProviderError(f"{path} has mode {mode:04o}, which lets others use it; run: chmod 600 {path}")


class SecretKeyWrapper:
    """A ``KeyWrapper`` with keys from a ``SecretProvider``, where there is neither Vault's transit engine nor KMS.

    Args:
        secrets: The provider of the wrapping keys.
        secret: The name of the secret, written as ``TENANCY_ENCRYPTION_KEYS`` is: ``1:<base64>,2:<base64>``; the last
            one wraps, all of them unwrap.
    """

    def __init__(self, secrets: SecretProvider, secret: str = "wrapping_keys") -> None:  # noqa: S107 - a name
        self._secrets = secrets
        self._secret = check_name(secret)
        self._keyring: Keyring | None = None

    def __repr__(self) -> str:
        """Name the provider and the secret."""
        return f"SecretKeyWrapper({self._secrets!r}, {self._secret!r})"

    @property
    def name(self) -> str:
        """``secret:`` and the name of the secret."""
        return f"secret:{self._secret}"

    async def wrap(self, key: bytes, *, context: Mapping[str, str]) -> bytes:
        """Encrypt ``key`` with the newest wrapping key.

        Raises:
            SecretProviderError: the wrapping keys cannot be read.
            ConfigurationError: they are malformed.
        """
        return (await self._read()).seal(key, associated=encode_context(context))

    async def unwrap(self, wrapped: bytes, *, context: Mapping[str, str]) -> bytes:
        """Decrypt what ``wrap`` made.

        Raises:
            SecretProviderError: the wrapping keys cannot be read, or none of them decrypts it.
            ConfigurationError: they are malformed.
        """
        associated = encode_context(context)
        if self._keyring is not None:
            # the keys that were read before; if none of them decrypts it, they may have been rotated since
            with suppress(SecretError):
                return self._keyring.open(wrapped, associated=associated)
        try:
            return (await self._read()).open(wrapped, associated=associated)
        except SecretError as exc:
            raise SecretProviderError(f"{self.name} does not unwrap a key: {exc}") from None

    async def close(self) -> None:
        """Close the provider."""
        self._keyring = None
        await self._secrets.close()

    async def _read(self) -> Keyring:
        keys = parse_keys(self._secret, await self._secrets.read(self._secret))
        if not all(len(key_id) <= _MAX_KEY_ID and len(key) == _KEY_BYTES for key_id, key in keys.items()):
            raise ConfigurationError(
                f"each of {self._secret!r} must be {_KEY_BYTES} bytes, with an id of {_MAX_KEY_ID} characters at most"
            )
        self._keyring = Keyring(keys)
        return self._keyring


def encode_context(context: Mapping[str, str]) -> bytes:
    """Encode a context, so that equal contexts give equal bytes."""
    return json.dumps(dict(context), sort_keys=True, separators=(",", ":")).encode()


async def read_secrets(config: TenancyConfig) -> TenancyConfig:
    """Return ``config`` with the options that ``secrets.options`` names read from its provider; those already set stay.

    If no options are named, that is ``encryption_keys``, or none with a ``key_wrapper``.

    Raises:
        SecretNotFoundError: the provider does not have one of them.
        SecretProviderError: it does not answer, or refuses.
        ConfigurationError: a secret is malformed.
    """
    if config.secrets.provider is None:
        return config
    options = config.secrets.options
    if options is None:
        options = () if config.secrets.key_wrapper is not None else ("encryption_keys",)
    found: dict[str, Any] = {}
    if "encryption_keys" in options and config.encryption_keys is None:
        found["encryption_keys"] = await _read_keys(config.secrets.provider, "encryption_keys")
    if "key_peppers" in options and config.keys.peppers is None:
        found["keys"] = {"peppers": await _read_keys(config.secrets.provider, "key_peppers")}
    return config.replace(**found)


async def _read_keys(provider: SecretProvider, name: str) -> Mapping[str, bytes]:
    return parse_keys(name, await provider.read(name))


__all__ = [
    "EnvironmentSecrets",
    "FileSecrets",
    "SecretKeyWrapper",
    "check_name",
    "encode_context",
    "read_secrets",
    "without_payload_logs",
]
