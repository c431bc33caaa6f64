"""The control database is backed up by the application's own role, as workers do it: whole, or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import Backup
from tenancy_orm.backups.dump import Dump
from tenancy_orm.control.grants import application_policy
from tenancy_orm.errors import BackupError
from tests.integration.backups.conftest import tenancy_config
from tests.integration.backups.test_backups import statement
from tests.support.postgres import Postgres
from tests.support.processes import opened

__all__ = ["tenancy_config"]

PASSWORD = "of the application alone"


@dataclass
class Application:
    """A process that logs in as the application's role."""

    tenancy: Tenancy
    policy: str


@pytest.fixture
async def application(
    tenancy: Tenancy, tenancy_config: TenancyConfig, postgres: Postgres
) -> AsyncIterator[Application]:
    role, control = postgres.new_name("app"), tenancy.internals.control
    await postgres.administer(f"CREATE ROLE \"{role}\" LOGIN PASSWORD '{PASSWORD}'")
    await control.grant_application(role)
    url = postgres.url(control.database, user=role, password=PASSWORD)
    try:
        async with opened(tenancy_config.replace(control_url=url)) as other:
            yield Application(other, application_policy(role))
    finally:
        async with postgres.connect(control.database) as admin:
            await admin.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')


def entries_of(made: Backup) -> int:
    """How many entries of the audit log a backup has."""
    assert made.manifest is not None
    tables = made.manifest.tables.items()
    return sum(rows for name, rows in tables if name.startswith("tenancy.audit_log_y"))


async def test_the_applications_role_makes_a_backup_of_all_rows(tenancy: Tenancy, application: Application) -> None:
    """Also of the log's months that are made after the role was granted its rights, and of those that are detached."""
    backups = application.tenancy.backups
    assert await application.tenancy.audit.ensure_partitions(6) > 0
    await statement(
        tenancy, "SELECT tenancy.audit_append('a.b', NULL, NULL, 'system', NULL, NULL, NULL, NULL, NULL, NULL)"
    )
    made = await backups.run_control()
    assert made.manifest is not None
    ((sequence,),) = await statement(tenancy, "SELECT sequence FROM tenancy.audit_log WHERE action = 'backup.run'")
    assert entries_of(made) == sequence - 1 > 0
    assert made.manifest.tables["tenancy.installation"] == 1
    verified = await backups.verify(made)
    assert (verified.error, verified.rows) == (None, made.manifest.rows)
    by_owner = await tenancy.backups.run_control()
    assert by_owner.manifest is not None and by_owner.manifest.tables.keys() == made.manifest.tables.keys()
    ((last,),) = await statement(
        tenancy, "SELECT max(inhrelid::regclass::text) FROM pg_inherits WHERE inhparent = 'tenancy.audit_log'::regclass"
    )
    await statement(tenancy, f"ALTER TABLE tenancy.audit_log DETACH PARTITION {last}")
    again = await backups.run_control()
    assert again.manifest is not None and last in again.manifest.tables


PARTIAL = {
    "no policy": ("DROP POLICY {policy} ON tenancy.{month}", "rows of tenancy.{month} from role"),
    "a restrictive policy": (
        "CREATE POLICY restricted ON tenancy.{month} AS RESTRICTIVE USING (sequence > 2)",
        "rows of tenancy.{month} from role",
    ),
    "a narrower policy": (
        "ALTER POLICY {policy} ON tenancy.{month} USING (sequence > 2)",
        "rows of tenancy.{month} from role",
    ),
    "a table that has row security since": (
        "ALTER TABLE tenancy.tiers ENABLE ROW LEVEL SECURITY",
        "rows of tenancy.tiers from role",
    ),
    "a partition of another schema": (
        "CREATE SCHEMA archive; ALTER TABLE tenancy.{month} SET SCHEMA archive",
        "archive.{month} of tenancy.audit_log",
    ),
}


@pytest.mark.parametrize(("statements", "message"), PARTIAL.values(), ids=PARTIAL)
async def test_a_backup_that_would_lack_rows_is_refused_by_the_tables_name(
    tenancy: Tenancy, application: Application, monkeypatch: pytest.MonkeyPatch, statements: str, message: str
) -> None:
    """The counts that it is verified with lack the same rows."""
    ((month,),) = await statement(tenancy, "SELECT to_char(now() AT TIME ZONE 'UTC', '\"audit_log_y\"YYYY\"m\"MM')")
    backups = application.tenancy.backups
    for one in statements.format(policy=application.policy, month=month).split("; "):
        await statement(tenancy, one)
    with pytest.raises(BackupError, match=message.format(month=month)):
        await backups.run_control()
    (failed, *_) = await backups.list(control=True)
    assert failed.state == "failed" and message.format(month=month) in (failed.error or "")

    # what is refused: one that lacks rows, and that passes
    async def accept(*_: object) -> None:
        return None

    monkeypatch.setattr(Dump, "_refuse_partial", accept)
    partial = await backups.run_control()
    assert (await backups.verify(partial)).error is None
    assert partial.manifest is not None
    ((sequence,),) = await statement(tenancy, "SELECT sequence FROM tenancy.audit_log WHERE action = 'backup.run'")
    ((tiers,),) = await statement(tenancy, "SELECT count(*) FROM tenancy.tiers")
    assert entries_of(partial) < sequence - 1 or partial.manifest.tables["tenancy.tiers"] < tiers
