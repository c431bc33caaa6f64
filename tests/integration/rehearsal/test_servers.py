"""Clones on servers of every version, made by an administrator who is no superuser where that is enough."""

from __future__ import annotations

import base64
import secrets
from pathlib import Path

import pytest
import sqlalchemy as sa

from tenancy_orm import TenancyConfig
from tenancy_orm.postgres.programs import find_programs
from tenancy_orm.provisioning.copies.making import Content
from tests.support.fleet import open_fleet
from tests.support.postgres import ENDED, Postgres
from tests.support.projects import NOTES, Project
from tests.support.provisioning import VERSIONS, plain_administrator, running_server


@pytest.mark.parametrize("version", VERSIONS)
async def test_an_upgrade_is_rehearsed_on_every_server(
    version: int, postgres: Postgres, control_url: str, name_prefix: str, tmp_path: Path
) -> None:
    """With rows, and with the schema alone; programs that are newer than the server do as well."""
    project = Project.create(tmp_path / "app")
    project.add("0001", NOTES, 'op.drop_table("notes")')
    with running_server(version, postgres.worker) as server:
        async with plain_administrator(server) as plain:
            config = TenancyConfig(
                control_url=control_url,
                servers={"default": plain if version >= 16 else server.admin_url},
                migrations=project.migrations,
                encryption_keys={"1": base64.b64encode(secrets.token_bytes(32)).decode()},
                name_prefix=name_prefix,
            )
            async with open_fleet(config, initialise=True) as fleet:
                await fleet.create("acme")
                async with fleet.tenancy.transaction("acme") as session:
                    await session.execute(sa.text("INSERT INTO notes (body) VALUES ('a note')"))
                project.add(
                    "0002",
                    'op.add_column("notes", sa.Column("n", sa.Integer))',
                    'op.drop_column("notes", "n")',
                    down="0001",
                )
                contents: tuple[Content, ...] = ("data", "schema")
                for content in contents:
                    report = await fleet.migrations.rehearse(content=content)
                    assert report.ok, report.failures
                    noted = any("PostgreSQL 18" in note for note in report.notes)
                    assert noted is (content == "schema" and version < 18)
                newer = str(find_programs(18).directory)
                async with open_fleet(config.replace(provisioning={"client_programs": newer})) as again:
                    report = await again.migrations.rehearse()
                    assert report.ok, report.failures
                # a session that is open when the copy is dropped
                async with fleet.provisioner.copies.open(fleet.tenants["acme"], timeout=60, valid_for=60) as copy:
                    connection = await copy.login.connect(timeout=10)
                with pytest.raises(ENDED):
                    await connection.fetch("SELECT 1")
                stem = fleet.services.names.scratch("")
                async with server.connect() as connection:
                    left = await connection.fetch(
                        "SELECT datname FROM pg_database WHERE starts_with(datname::text, $1) UNION ALL "
                        "SELECT rolname FROM pg_roles WHERE starts_with(rolname::text, $1)",
                        stem,
                    )
                assert left == []
