"""Where secrets come from: the environment and files here; HashiCorp Vault in ``vault``, AWS in ``aws``.

A ``SecretProvider`` returns secrets by name. A ``KeyWrapper`` never returns its key, but encrypts others under it: the
keys that seal tenants' passwords are then worth nothing without it (envelope encryption, see ``data_keys``). Both are
protocols of ``config``: an application can bring its own.
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
from ..protocols import KeyWrapper, SecretProvider
from .keyring import Keyring

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_MAX_BYTES = 64 * 1024
_KEY_BYTES = 32
_MAX_KEY_ID = 16


# those that log what they send and receive, and those that do so in no version we know of; with what is below them
_LOGGERS = ("botocore", "boto3", "hvac", "requests", "urllib3")
_WITH_PAYLOADS = ("botocore.endpoint", "botocore.parsers", "botocore.auth", "botocore.hooks")
_carries_secrets: ContextVar[bool] = ContextVar("tenancy_carries_secrets", default=False)


class _SecretCalls(logging.Filter):
    """Drops what a library tells of a call that carries secrets, below warnings: its DEBUG log quotes the payload."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record may be logged."""
        return record.levelno >= logging.WARNING or not _carries_secrets.get()


_SECRET_CALLS = _SecretCalls()


@contextmanager
def without_payload_logs() -> Iterator[None]:
    """Keep the payload of calls within, in this task and in threads it starts, out of the libraries' logs.

    Calls of the same libraries elsewhere in the process are logged as before. A logger's filter sees what is logged by
    that logger itself, not by those below it, so that each of them gets it.
    """
    for name in (*_WITH_PAYLOADS, *logging.root.manager.loggerDict):
        if name.partition(".")[0] in _LOGGERS:
            logging.getLogger(name).addFilter(_SECRET_CALLS)  # a second time is none
    token = _carries_secrets.set(True)
    try:
        yield
    finally:
        _carries_secrets.reset(token)


def check_name(name: str) -> str:
    """Return the name of a secret, if it is one that every provider can keep.

    Raises:
        ConfigurationError: it is not 1 to 128 of letters, digits, dots, hyphens and underscores.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{name!r} cannot be the name of a secret")
    return name


class EnvironmentSecrets:
    """Secrets in environment variables: ``encryption_keys`` is ``<prefix>ENCRYPTION_KEYS``.

    Args:
        prefix: What the variables begin with.
        environ: Where they are; ``os.environ`` by default.
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
    """Secrets in files, one each, named as the secret: what ``systemd-creds``, Docker and Kubernetes mount.

    A file that others could read or change is refused, like ssh does with a private key. Line ends at the end of a file
    are no part of the secret.

    Args:
        directory: Where the files are.
        allow: Permission bits that are acceptable beyond the owner's: 0o044 for mounts that are readable by everyone
            inside a container.
    """

    def __init__(self, directory: str | Path, *, allow: int = 0) -> None:
        if allow & 0o022:
            raise ConfigurationError("a secret that others may write is no secret; allow may hold 0o044 at most")
        self._directory = Path(directory)
        self._refused = 0o077 & ~allow

    def __repr__(self) -> str:
        """Name the directory."""
        return f"FileSecrets({str(self._directory)!r})"

    async def read(self, name: str) -> str:
        """Return the file's text.

        Raises:
            SecretNotFoundError: there is no such file.
            SecretProviderError: it cannot be read, is no file, or is open to others.
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
        # what is checked is what is read: the file is opened first. A link is followed, since mounts use them.
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
            raise SecretProviderError(f"{path} has mode {mode:04o} and is open to others; run: chmod 600 {path}")


class SecretKeyWrapper:
    """A ``KeyWrapper`` whose keys come from a ``SecretProvider``, where there is neither Vault's transit nor KMS.

    Args:
        secrets: Where the wrapping keys are kept.
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
        """The name of the secret."""
        return f"secret:{self._secret}"

    async def wrap(self, key: bytes, *, context: Mapping[str, str]) -> bytes:
        """Encrypt ``key`` under the newest wrapping key there is now.

        Raises:
            SecretProviderError: the wrapping keys cannot be read.
            ConfigurationError: they are malformed.
        """
        return (await self._read()).seal(key, associated=encode_context(context))

    async def unwrap(self, wrapped: bytes, *, context: Mapping[str, str]) -> bytes:
        """Decrypt what ``wrap`` made.

        Raises:
            SecretProviderError: the wrapping keys cannot be read, or none of them opens it.
            ConfigurationError: they are malformed.
        """
        associated = encode_context(context)
        if self._keyring is not None:
            # those that were read already; if none opens it, they may have been rotated since
            with suppress(SecretError):
                return self._keyring.open(wrapped, associated=associated)
        try:
            return (await self._read()).open(wrapped, associated=associated)
        except SecretError as exc:
            raise SecretProviderError(f"a key does not unwrap by {self.name}: {exc}") from None

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
    """Write a context so that equal ones are equal bytes."""
    return json.dumps(dict(context), sort_keys=True, separators=(",", ":")).encode()


async def read_secrets(config: TenancyConfig) -> TenancyConfig:
    """Return ``config`` with what ``secrets.options`` names filled in from its provider; what is set already stays.

    Where nothing is named, that is ``encryption_keys``, unless a ``key_wrapper`` makes them needless.

    Raises:
        SecretNotFoundError: the provider lacks one.
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
    "KeyWrapper",
    "SecretKeyWrapper",
    "SecretProvider",
    "check_name",
    "encode_context",
    "read_secrets",
    "without_payload_logs",
]
