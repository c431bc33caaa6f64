"""HashiCorp Vault, over HTTP."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tenancy_orm.errors import ConfigurationError, SecretNotFoundError, SecretProviderError
from tenancy_orm.secrets.vault import VaultConnection, VaultSecrets, VaultTransit
from tests.support.vault import FakeVault, fake_vault


@pytest.fixture
def vault() -> Iterator[FakeVault]:
    """A server with Vault's API."""
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
    """It logs in once, however many calls find the token expired."""
    connection = VaultConnection(vault.url, role_id="role-1", secret_id="secret-1")
    secrets = VaultSecrets(connection)
    assert await asyncio.gather(*(secrets.read("encryption_keys") for _ in range(5))) == ["1:abc"] * 5
    assert vault.logins == 1
    vault.tokens.clear()
    assert await asyncio.gather(*(secrets.read("encryption_keys") for _ in range(5))) == ["1:abc"] * 5
    assert vault.logins == 2
    await connection.close()


async def test_a_token_that_another_call_has_just_renewed_is_no_refusal(
    vault: FakeVault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that checks its token finds the new one."""
    connection = VaultConnection(vault.url, role_id="role-1", secret_id="secret-1")
    secrets = VaultSecrets(connection)
    assert await secrets.read("encryption_keys") == "1:abc"
    expired = connection._client.token
    vault.tokens.clear()
    asks = connection._is_valid

    async def after_another() -> bool:
        await connection._log_in(expired)
        return await asks()

    monkeypatch.setattr(connection, "_is_valid", after_another)
    assert await secrets.read("encryption_keys") == "1:abc"
    assert vault.logins == 2
    await connection.close()


async def test_a_refused_token_is_an_error(vault: FakeVault) -> None:
    """It is not reported as a missing secret, nor is a wrong AppRole."""
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
    """Sealed, not answering, or not reachable."""
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


async def test_a_policy_that_does_not_admit_is_no_reason_to_log_in_again(vault: FakeVault) -> None:
    """Another token would be refused too, and tokens would pile up."""
    vault.denied.add("secret/data/tenancy/encryption_keys")
    connection = VaultConnection(vault.url, role_id="role-1", secret_id="secret-1")
    for _ in range(3):
        with pytest.raises(SecretProviderError, match="policy"):
            await VaultSecrets(connection).read("encryption_keys")
    assert vault.logins == 1
    await connection.close()


ODD: list[tuple[int, Any]] = [
    (307, {}),  # a redirect, which is not followed
    (204, None),
    (200, "<html>a proxy's page</html>"),
    (200, {"data": None}),
    (200, {"data": {"data": None, "plaintext": "&", "ciphertext": None}}),
    (200, []),
]


@pytest.mark.parametrize("odd", ODD, ids=repr)
@pytest.mark.parametrize("options", [{"token": "root"}, {"role_id": "role-1", "secret_id": "secret-1"}], ids=str)
async def test_an_answer_that_is_none_of_vaults_is_an_error_of_the_provider(
    vault: FakeVault, odd: tuple[int, Any], options: dict[str, str]
) -> None:
    """A proxy may answer instead; it is neither followed nor misread."""
    vault.odd = odd
    connection = VaultConnection(vault.url, **options)  # type: ignore[arg-type]
    with pytest.raises(SecretProviderError):
        await VaultSecrets(connection).read("encryption_keys")
    with pytest.raises(SecretProviderError):
        await VaultTransit(connection).unwrap(b"vault:v1:AAAA", context={})
    assert not [request for request in vault.requests if request.startswith("GET elsewhere")]
    await connection.close()


async def test_no_log_holds_what_is_secret(vault: FakeVault, caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG, of all loggers: neither the token, nor what is read, nor what is wrapped."""
    caplog.set_level(logging.DEBUG)
    connection = VaultConnection(vault.url, role_id="role-1", secret_id="secret-1")
    transit, key = VaultTransit(connection), bytes(range(32))
    vault.stored["tenancy/encryption_keys"] = {"value": "1:c2VjcmV0"}
    assert await VaultSecrets(connection).read("encryption_keys") == "1:c2VjcmV0"
    assert await transit.unwrap(await transit.wrap(key, context={}), context={}) == key
    needles = ("c2VjcmV0", "secret-1", repr(key), base64.b64encode(key).decode(), *vault.tokens - {"root"})
    assert [record for record in caplog.records if any(needle in record.getMessage() for needle in needles)] == []
    await connection.close()


async def test_no_token_is_taken_from_the_environment(vault: FakeVault, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own token may allow more than the configured AppRole."""
    monkeypatch.setenv("VAULT_TOKEN", "root")
    connection = VaultConnection(vault.url, role_id="role-1", secret_id="wrong-secret")
    with pytest.raises(SecretProviderError):
        await VaultSecrets(connection).read("encryption_keys")
    await connection.close()


async def test_a_name_that_leads_elsewhere_is_refused(vault: FakeVault) -> None:
    """Before Vault is called."""
    connection = VaultConnection(vault.url, token="root")
    with pytest.raises(ConfigurationError):
        await VaultSecrets(connection).read("../other")
    with pytest.raises(ConfigurationError):
        VaultTransit(connection, key="../other")
    assert vault.requests == []
    await connection.close()


def test_one_way_to_log_in_is_given() -> None:
    """Exactly one way to log in must be given."""
    for options in ({}, {"token": "t", "role_id": "r"}):
        with pytest.raises(ConfigurationError, match="token"):
            VaultConnection("http://127.0.0.1", **options)  # type: ignore[arg-type]
