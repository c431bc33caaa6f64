"""Secrets in AWS: Secrets Manager, and keys wrapped by KMS. Extra ``aws``.

boto3 is synchronous, so every call runs in a worker thread; it makes three attempts at most, each bounded by
``timeout``. boto3 finds the credentials and the region: in the environment, a profile, or the instance's or task's
role.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import MissingExtraError, SecretNotFoundError, SecretProviderError
from .providers import check_name, without_payload_logs


class _Client:
    """A boto3 client, created on first use: that reads files and takes a tenth of a second."""

    def __init__(self, service: str, *, region: str | None, endpoint_url: str | None, timeout: float) -> None:
        try:
            import boto3
            from botocore.config import Config
        except ModuleNotFoundError as exc:
            raise MissingExtraError("boto3", "aws") from exc
        self._service = service
        config = Config(
            connect_timeout=timeout, read_timeout=timeout, retries={"mode": "standard", "total_max_attempts": 3}
        )
        self._make: Callable[[], Any] = lambda: boto3.session.Session(region_name=region).client(
            service, endpoint_url=endpoint_url, config=config
        )
        self._client: Any = None
        self._making = asyncio.Lock()

    async def call(self, operation: str, arguments: dict[str, Any], *, missing: SecretNotFoundError) -> Any:
        """Call an operation.

        Raises:
            SecretNotFoundError: ``missing``, if AWS does not have it.
            SecretProviderError: AWS does not answer, or refuses.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            async with self._making:
                if self._client is None:
                    with without_payload_logs():  # it may request credentials
                        self._client = await asyncio.to_thread(self._make)
            with without_payload_logs():
                return await asyncio.to_thread(getattr(self._client, operation), **arguments)
        except ClientError as exc:
            code = str(exc.response.get("Error", {}).get("Code", "unknown"))
            if code in ("ResourceNotFoundException", "NotFoundException"):
                raise missing from None
            raise SecretProviderError(f"AWS {self._service} refuses {operation}: {code}") from None
        except BotoCoreError as exc:
            raise SecretProviderError(f"AWS {self._service} is not available: {type(exc).__name__}") from None

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await asyncio.to_thread(client.close)


class AwsSecrets:
    """Secrets in AWS Secrets Manager, as strings, each under ``<prefix><name>``.

    Args:
        prefix: The prefix of the secrets' names in AWS.
        region: The region; boto3's default if None.
        endpoint_url: Another endpoint, such as a VPC's.
        timeout: Seconds for a connect, and for an answer; a call has three attempts.

    Raises:
        MissingExtraError: boto3 is not installed.
    """

    def __init__(
        self,
        prefix: str = "tenancy/",
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        timeout: float = 5.0,
    ) -> None:
        self._prefix = prefix
        self._client = _Client("secretsmanager", region=region, endpoint_url=endpoint_url, timeout=timeout)

    def __repr__(self) -> str:
        """Name the prefix."""
        return f"AwsSecrets({self._prefix!r})"

    async def read(self, name: str) -> str:
        """Return the current version of a secret.

        Raises:
            SecretNotFoundError: there is none, or it is not text.
            SecretProviderError: AWS does not answer, or refuses.
        """
        secret = self._prefix + check_name(name)
        missing = SecretNotFoundError(name, f"AWS Secrets Manager, as {secret}")
        answer = await self._client.call("get_secret_value", {"SecretId": secret}, missing=missing)
        value = answer.get("SecretString")
        if not isinstance(value, str):
            raise missing
        return value

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()


class AwsKms:
    """Wraps keys with a key that never leaves AWS KMS. KMS can rotate it: what it wrapped before still unwraps.

    Args:
        key: The key's id, ARN or alias (``alias/tenancy``).
        region: The region; boto3's default if None.
        endpoint_url: Another endpoint, such as a VPC's.
        timeout: Seconds for a connect, and for an answer; a call has three attempts.

    Raises:
        MissingExtraError: boto3 is not installed.
    """

    def __init__(
        self, key: str, *, region: str | None = None, endpoint_url: str | None = None, timeout: float = 5.0
    ) -> None:
        self._key = key
        self._client = _Client("kms", region=region, endpoint_url=endpoint_url, timeout=timeout)

    def __repr__(self) -> str:
        """Name the key."""
        return f"AwsKms({self._key!r})"

    @property
    def name(self) -> str:
        """``aws-kms:`` and the key, as it was configured."""
        return f"aws-kms:{self._key}"

    async def wrap(self, key: bytes, *, context: Mapping[str, str]) -> bytes:
        """Encrypt ``key``; ``context`` becomes the encryption context, which CloudTrail records.

        Raises:
            SecretProviderError: AWS does not answer, or refuses.
        """
        answer = await self._call("encrypt", Plaintext=key, EncryptionContext=dict(context))
        return bytes(answer["CiphertextBlob"])

    async def unwrap(self, wrapped: bytes, *, context: Mapping[str, str]) -> bytes:
        """Decrypt what ``wrap`` made.

        Raises:
            SecretProviderError: AWS does not answer, or refuses, for example because the context or key is another.
        """
        answer = await self._call("decrypt", CiphertextBlob=wrapped, EncryptionContext=dict(context))
        return bytes(answer["Plaintext"])

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()

    async def _call(self, operation: str, **arguments: Any) -> Any:
        # decrypt names the key too, so that KMS refuses what another key wrapped
        return await self._client.call(
            operation, {"KeyId": self._key, **arguments}, missing=SecretNotFoundError(self._key, "AWS KMS")
        )


__all__ = ["AwsKms", "AwsSecrets"]
