"""A key is compared with the one that was used under its id, before anything is sealed or refused with it."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import ConfigurationError, InvalidCredentialError, SecretError
from tenancy_orm.secrets.key_checks import check_keys


def new_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()


async def forget_checks(tenancy: Tenancy) -> None:
    """As before the upgrade that brought them."""
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("DELETE FROM tenancy.key_checks"))


async def test_another_key_under_a_known_id_is_refused(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """Without the check values it would seal; the message names the id and both ways out."""
    await tenancy.tenants.create("acme")
    wrong = tenancy_config.replace(encryption_keys={"1": new_key()})
    message = r"key '1' is not the key .* under that id: .* an id of its own; .* tenancy secrets rotate-passwords"
    with pytest.raises(ConfigurationError, match=message) as caught:
        await Tenancy(wrong).open()
    assert str(wrong.encryption_keys) not in str(caught.value)
    # the first opening after the upgrade, by a process with the wrong key
    await forget_checks(tenancy)
    with pytest.raises(ConfigurationError, match=message):
        await Tenancy(wrong).open()
    async with Tenancy(tenancy_config) as other, other.session("acme") as session:
        assert await session.scalar(text("SELECT 1")) == 1


async def test_the_check_values_refuse_what_would_seal_under_two_keys(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the check off, a creation succeeds and its password is sealed under another key of the same id."""

    async def nothing(*args: object, **options: object) -> None:
        pass

    await tenancy.tenants.create("acme")
    wrong = tenancy_config.replace(encryption_keys={"1": new_key()})
    with monkeypatch.context() as patch:
        patch.setattr("tenancy_orm.assembly.check_keys", nothing)
        async with Tenancy(wrong) as other:
            await other.tenants.create("globex")
            with pytest.raises(SecretError, match=r"another key of that id.*tenancy secrets rotate-passwords"):
                async with other.session("acme") as session:
                    await session.scalar(text("SELECT 1"))
    with pytest.raises(ConfigurationError):
        await Tenancy(wrong).open()
    assert not (await tenancy.secrets.rotate_passwords()).failed
    async with tenancy.session("globex") as session:
        assert await session.scalar(text("SELECT 1")) == 1


async def test_of_two_processes_that_record_at_once_one_wins(tenancy: Tenancy) -> None:
    """The other one compares, and is refused."""
    await forget_checks(tenancy)
    control, keys = tenancy.internals.control, [secrets.token_bytes(32) for _ in range(2)]
    outcomes = await asyncio.gather(
        *(check_keys(control, encryption_keys={"9": key}, peppers={"p": key}) for key in keys), return_exceptions=True
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ConfigurationError", "NoneType"]
    async with control.connect() as connection:
        stored = b"".join(await connection.scalars(text("SELECT value FROM tenancy.key_checks")))
    assert not any(key in stored for key in keys)


async def test_a_lost_key_loses_no_data(
    tenancy: Tenancy, tenancy_config: TenancyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """The new key alone, under a new id, and ``rotate_passwords``: the administrator needs no old password."""
    await tenancy.tenants.create("acme")
    await tenancy.execute("INSERT INTO notes (body) VALUES ('kept')", tenant="acme")
    await tenancy.close()
    recovering = Tenancy(tenancy_config.replace(encryption_keys={"2": new_key()}))
    with caplog.at_level(logging.ERROR, "tenancy_orm.secrets"):
        await recovering.open()
    assert "passwords of 1 tenant are sealed under key '1', which is not configured" in caplog.text
    async with recovering:
        with pytest.raises(SecretError, match=r"sealed with key '1', which is not configured; .*rotate-passwords"):
            await recovering.fetch_value("SELECT body FROM notes", tenant="acme")
        report = await recovering.secrets.rotate_passwords()
        assert (report.rotated, report.failed) == (1, {})
        assert await recovering.fetch_value("SELECT body FROM notes", tenant="acme") == "kept"
        assert await recovering.secrets.keys_in_use() == {"2"}
    await recovering.close()


async def test_another_pepper_under_a_known_id_is_refused(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """Otherwise every API key would be unknown. After a loss, a new one under a new id, and new API keys."""
    peppered = tenancy_config.replace(keys={"peppers": {"a": new_key()}})
    async with Tenancy(peppered) as first:
        created = await first.tenants.create("acme")
    with pytest.raises(ConfigurationError, match=r"pepper 'a' .* must be issued again"):
        await Tenancy(tenancy_config.replace(keys={"peppers": {"a": new_key()}})).open()
    async with Tenancy(tenancy_config.replace(keys={"peppers": {"b": new_key()}})) as lost:
        assert created.api_key is not None
        with pytest.raises(InvalidCredentialError):
            await lost.tenants.get_by_api_key(created.api_key)
        issued = await lost.keys.issue("acme")
        assert (await lost.tenants.get_by_api_key(issued.text)).slug == "acme"
