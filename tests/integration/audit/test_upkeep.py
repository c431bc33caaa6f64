"""A whole ``Tenancy`` and the audit log: retention by housekeeping, and signatures that outlive their keys."""

from __future__ import annotations

import base64
import secrets
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.audit.checkpoints import Signer
from tenancy_orm.audit.log import AuditLog
from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.secrets.providers import EnvironmentSecrets, SecretKeyWrapper
from tests.support.audit import age
from tests.support.processes import opened
from tests.support.waiting import until

LONG_AGO = datetime(2024, 1, 15, tzinfo=UTC)


@pytest.fixture
async def aged_config(tenancy_config: TenancyConfig) -> TenancyConfig:
    """An installation with a log that begins in January 2024."""
    control = ControlDatabase(tenancy_config.control_url, name_prefix=tenancy_config.name_prefix)
    try:
        await control.upgrade()
        await control.open()
        await age(control, AuditLog(control, Signer(tenancy_config.sealing_keys)), LONG_AGO, 3)
    finally:
        await control.close()
    return tenancy_config


@pytest.fixture
def wrapped_config(aged_config: TenancyConfig) -> TenancyConfig:
    """... which seals, and signs, with data keys."""
    wrapper = SecretKeyWrapper(
        EnvironmentSecrets("W_", {"W_WRAPPING_KEYS": f"1:{base64.b64encode(secrets.token_bytes(32)).decode()}"})
    )
    return aged_config.replace(encryption_keys=None, secrets={"key_wrapper": wrapper})


OLDEST = text("SELECT min(inhrelid::regclass::text) FROM pg_inherits WHERE inhparent = 'tenancy.audit_log'::regclass")


async def oldest_month(tenancy: Tenancy) -> str:
    """The name of the log's first partition."""
    async with tenancy.internals.control.connect() as connection:
        return str(await connection.scalar(OLDEST))


# --- housekeeping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("days", "removed"), [(0.0, False), (30.0, True), (36_500.0, False)])
async def test_housekeeping_removes_the_months_that_are_past_retention(
    aged_config: TenancyConfig, days: float, removed: bool
) -> None:
    """By ``retention.audit_seconds``; 0 keeps everything; the rest of the log is still valid."""
    config = aged_config.replace(retention={"audit_seconds": days * 86_400})
    async with opened(config, initialise=True) as tenancy:
        assert await oldest_month(tenancy) == "tenancy.audit_log_y2024m01"
        report = await tenancy.run_housekeeping()
        assert report.errors == ()
        cut = report.chores["prune_audit"]
        assert (cut.sequence if cut else None) == (3 if removed else None)
        assert (await oldest_month(tenancy) == "tenancy.audit_log_y2024m01") is not removed
        assert (await tenancy.audit.verify()).ok


async def test_housekeeping_prepares_the_logs_partitions_and_removes_old_samples(tenancy: Tenancy) -> None:
    """Samples are kept for 90 days."""
    acme = (await tenancy.tenants.create("acme")).tenant
    async with tenancy.internals.control.transaction() as connection:
        for days in (91, 89):
            await connection.execute(
                text(
                    "INSERT INTO tenancy.tenant_metrics VALUES (:id, now() - make_interval(days => :days), 7, 0, 0, 0)"
                ),
                {"id": acme.id, "days": days},
            )
        await connection.execute(
            text(
                "DO $$ BEGIN EXECUTE 'DROP TABLE tenancy.' || (SELECT max(c.relname) FROM pg_inherits i "
                "JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'tenancy.audit_log'::regclass); END $$"
            )
        )
    report = await tenancy.run_housekeeping()
    assert report.errors == ()
    assert report.chores["prepare_audit_partitions"] == 1
    assert report.chores["prune_metrics"] == 1
    kept = [sample.sampled_at for sample in await tenancy.metrics.history(acme) if sample.size_bytes == 7]
    assert len(kept) == 1 and kept[0] > datetime.now(UTC) - timedelta(days=90)


# --- keys -----------------------------------------------------------------------------------------------------------


async def test_the_log_verifies_after_each_step_of_an_encryption_keys_rotation(aged_config: TenancyConfig) -> None:
    """The three deployments of docs/secrets.md; the cut and the checkpoint were signed with the old key."""
    old, new = next(iter(aged_config.sealing_keys.values())), secrets.token_bytes(32)
    async with opened(aged_config, initialise=True) as tenancy:
        assert await tenancy.audit.prune(before=datetime(2024, 2, 1, tzinfo=UTC)) is not None
        checkpoint = await tenancy.audit.export_checkpoint()
    for keys, signs in (({"2": new, "1": old}, "1"), ({"1": old, "2": new}, "2"), ({"2": new}, "2")):
        async with opened(aged_config.replace(encryption_keys=keys)) as tenancy:
            report = await tenancy.audit.verify(checkpoint)
            assert report.ok and report.confirmed == (checkpoint.sequence,)
            assert (await tenancy.audit.export_checkpoint()).key_id == signs
    # the next key vouches for the old one as well
    async with opened(aged_config.replace(encryption_keys={"2": new, "3": secrets.token_bytes(32)})) as tenancy:
        assert set((await tenancy.audit.verifier()).public_keys) == {"1", "2", "3"}


async def test_a_running_process_signs_with_a_new_data_key_and_the_forgotten_one_still_verifies(
    wrapped_config: TenancyConfig,
) -> None:
    """In the process that rotates and in those that are notified; a process that starts later verifies it."""
    async with opened(wrapped_config, initialise=True) as tenancy, opened(wrapped_config) as other:
        await tenancy.tenants.create("acme")
        assert await tenancy.audit.prune(before=datetime(2024, 2, 1, tzinfo=UTC)) is not None
        before = await tenancy.audit.export_checkpoint()
        assert (await tenancy.secrets.rotate_encryption_key()).failed == {}
        after = await tenancy.audit.export_checkpoint()
        assert after.key_id != before.key_id

        async def received() -> bool:
            return (await other.audit.export_checkpoint()).key_id == after.key_id

        await until(received)
        assert await tenancy.secrets.forget_unused_keys() == [before.key_id]
        assert (await tenancy.audit.export_checkpoint()).key_id == after.key_id
        async with opened(wrapped_config) as fresh:
            report = await fresh.audit.verify([before, after])
            assert report.ok and set(report.confirmed) == {before.sequence, after.sequence}
