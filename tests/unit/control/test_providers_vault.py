"""HashiCorp Vault, spoken to over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from tenancy_orm.control.vault import VaultConnection, VaultSecrets, VaultTransit
from tenancy_orm.errors import ConfigurationError, SecretNotFoundError, SecretProviderError
from tests.support.vault import FakeVault, fake_vault


@pytest.fixture
def vault() -> Iterator[FakeVault]:
    """A server of Vault's API."""
    with fake_vault() as served:
        served.stored["tenancy/encryption_keys"] = {"value": "1:abc"}
        yield served


async def test_a_secret_is_a_field_of_the_key_value_engine(vault: FakeVault) -> None:
    """Below a path of the application's choice."""
    vault.stored["other/place/key"] = {"text": "found"}
    connection = VaultConnection(vault.url, token="root")
    assert await VaultSecrets(connection).read("encryption_keys") == "1:abc"
    assert await VaultSecrets(connection, path="/other/place/", field="text").read("key") == "found"
    await connection.close()


async def test_a_missing_secret_is_told_apart_from_a_failure(vault: FakeVault) -> None:
    """Absent, deleted, or without the field."""
    vault.stored["tenancy/deleted"] = None
    vault.stored["tenancy/other_field"] = {"text": "x"}
    secrets = VaultSecrets(VaultConnection(vault.url, token="root"))
    for name in ("absent", "deleted", "other_field"):
        with pytest.raises(SecretNotFoundError, match="Vault, secret/tenancy"):
            await secrets.read(name)
    await secrets.close()


async def test_transit_wraps_keys_in_their_context(vault: FakeVault) -> None:
    """The key that wraps them never leaves Vault."""
    transit = VaultTransit(VaultConnection(vault.url, token="root"))
    wrapped = await transit.wrap(b"k" * 32, context={"id": "1"})
    assert wrapped.startswith(b"vault:v1:")
    assert await transit.unwrap(wrapped, context={"id": "1"}) == b"k" * 32
    for other, context in ((wrapped, {"id": "2"}), (b"vault:v1:" + b"A" * 60, {"id": "1"}), (b"\xff", {"id": "1"})):
        with pytest.raises(SecretProviderError):
            await transit.unwrap(other, context=context)
    assert transit.name == "vault:transit/tenancy"
    await transit.close()


async def test_an_approle_logs_in_and_again_when_its_token_has_expired(vault: FakeVault) -> None:
    """Once, however many calls find it expired."""
    connection = VaultConnection(vault.url, role_id="role-1", secret_id="secret-1")
    secrets = VaultSecrets(connection)
    assert await asyncio.gather(*(secrets.read("encryption_keys") for _ in range(5))) == ["1:abc"] * 5
    assert vault.logins == 1
    vault.tokens.clear()
    assert await asyncio.gather(*(secrets.read("encryption_keys") for _ in range(5))) == ["1:abc"] * 5
    assert vault.logins == 2
    await connection.close()


async def test_a_refused_token_is_an_error(vault: FakeVault) -> None:
    """Not a missing secret. A wrong AppRole is another."""
    for connection in (
        VaultConnection(vault.url, token="wrong-token"),
        VaultConnection(vault.url, role_id="role-1", secret_id="wrong-secret"),
    ):
        with pytest.raises(SecretProviderError) as caught:
            await VaultSecrets(connection).read("encryption_keys")
        assert not isinstance(caught.value, SecretNotFoundError)
        assert "wrong-" not in str(caught.value) + repr(connection) + repr(caught.value.__cause__)
        await connection.close()


async def test_a_vault_that_does_not_serve_is_an_error_within_the_timeout(vault: FakeVault) -> None:
    """Sealed, silent, or not there."""
    connection = VaultConnection(vault.url, token="root", timeout=0.2)
    vault.sealed = True
    with pytest.raises(SecretProviderError, match="VaultDown"):
        await VaultSecrets(connection).read("encryption_keys")
    vault.sealed = False
    vault.delay.clear()
    started = time.monotonic()
    with pytest.raises(SecretProviderError, match="Timeout"):
        await VaultSecrets(connection).read("encryption_keys")
    assert time.monotonic() - started < 3
    await connection.close()
    gone = VaultConnection("http://127.0.0.1:1", token="root")
    with pytest.raises(SecretProviderError):
        await VaultTransit(gone).wrap(b"k" * 32, context={})
    await gone.close()


def test_one_way_to_log_in_is_given() -> None:
    """Not none, and not two."""
    for options in ({}, {"token": "t", "role_id": "r"}):
        with pytest.raises(ConfigurationError, match="token"):
            VaultConnection("http://127.0.0.1", **options)  # type: ignore[arg-type]
