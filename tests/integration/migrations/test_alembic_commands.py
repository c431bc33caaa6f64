"""The plain ``alembic`` program, run as a user runs it, works on a fleet of three tenants."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import FleetMigrationError
from tests.support import shell
from tests.support.alembic_program import Alembic
from tests.support.fleet import Fleet, until
from tests.support.projects import NOTES, Project
from tests.support.warm import run_module

TENANTS = ("acme", "globex", "initech")
RATING = 'op.add_column("notes", sa.Column("rating", sa.Integer))'
NO_RATING = 'op.drop_column("notes", "rating")'

APP = """
import sqlalchemy as sa

from tenancy_orm import TenancyConfig

metadata = sa.MetaData()
notes = sa.Table(
    "notes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("body", sa.String(1000), nullable=False),
)
config = TenancyConfig.from_env(metadata=metadata)
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path / "app", app="demo:config")
    project.add("0001", NOTES, 'op.drop_table("notes")')
    (project.root / "demo.py").write_text(APP)
    return project


async def revisions(fleet: Fleet) -> list[str | None]:
    return [await fleet.revision(slug) for slug in TENANTS]


async def test_upgrade_downgrade_and_current(alembic: Alembic, fleet: Fleet) -> None:
    alembic.project.add("0002", RATING, NO_RATING, down="0001")
    printed = await alembic("upgrade", "head")
    assert "upgrade head: 3 tenants, 3 migrated, 0 unchanged, 0 failed, " in printed
    assert await fleet.registry.fleet_revision() == "0002"
    for slug in TENANTS:
        assert f"[{slug}] Running upgrade 0001 -> 0002, a change" in printed
    assert printed.count("Context impl") == 0
    assert await revisions(fleet) == ["0002"] * 3
    assert await fleet.recorded("acme") == "0002"

    await alembic("-x", "tenant=acme", "-x", "tenant=globex", "-x", "concurrency=1", "downgrade", "-1")
    assert await revisions(fleet) == ["0001", "0001", "0002"]
    assert (await alembic("current")).startswith("acme: 0001\nglobex: 0001\ninitech: 0002 (head)\n")
    printed = await alembic("current", "--check-heads", ok=False)
    assert "2 of 3 tenants are not at head: acme, globex" in printed

    await alembic("downgrade", "base")
    assert await revisions(fleet) == [None] * 3
    assert (await alembic("-x", "tenant=acme", "current")).startswith("acme: <base>\n")
    await alembic("upgrade", "+1")
    assert await revisions(fleet) == ["0001"] * 3
    assert "1 migrated" in await alembic("-x", "tenant=acme", "upgrade", "0002")
    assert await revisions(fleet) == ["0002", "0001", "0001"]


async def test_a_failing_tenant_fails_the_command_and_not_the_others(alembic: Alembic, fleet: Fleet) -> None:
    alembic.project.add("0002", RATING, NO_RATING, down="0001")
    await fleet.execute("globex", "ALTER TABLE notes ADD rating text")
    printed = await alembic("upgrade", "head", ok=False)
    assert "FAILED: 1 of 3 tenants failed to migrate: globex" in printed
    assert "FAILED globex: upgrade 0001 -> 0002: " in printed
    assert "Traceback" not in printed
    assert await revisions(fleet) == ["0002", "0001", "0002"]
    printed = await alembic("-x", "tenant=nobody", "upgrade", "head", ok=False)
    assert "FAILED: tenant 'nobody' does not exist" in printed
    assert "FAILED: -x concurrency=many: give a number" in await alembic("-x", "concurrency=many", "current", ok=False)


async def test_stamp_history_show_and_heads(alembic: Alembic, fleet: Fleet) -> None:
    alembic.project.add("0002", RATING, NO_RATING, down="0001")
    await alembic("-x", "tenant=acme", "stamp", "head")
    assert await revisions(fleet) == ["0002", "0001", "0001"]
    assert await fleet.columns("acme") == ["id", "body"]
    printed = await alembic("history", "--indicate-current")
    assert "0001 -> 0002 (head) (current), a change" in printed
    assert "<base> -> 0001 (current), a change" in printed
    printed = await alembic("-x", "tenant=globex", "history", "-i")
    assert "0001 -> 0002 (head), a change" in printed
    assert (await alembic("history")).count("(current)") == 0
    printed = await alembic("show", "current")
    assert "Rev: 0001" in printed
    assert "Rev: 0002 (head)" in printed
    assert "0002 (head)" in await alembic("heads")
    assert "Rev: 0002 (head)" in await alembic("show", "head")
    printed = await alembic("current", "--verbose")
    assert f"acme:\nCurrent revision(s) for postgresql+asyncpg://127.0.0.1:" in printed  # noqa: F541
    assert fleet.database("acme") in printed
    await fleet.execute("acme", "UPDATE alembic_version SET version_num = 'lost'")
    await alembic("stamp", "--purge", "0001")
    assert await revisions(fleet) == ["0001"] * 3


async def test_check_and_autogenerate_compare_with_the_template(alembic: Alembic, fleet: Fleet) -> None:
    await fleet.execute("acme", "CREATE TABLE of_the_tenants_own (id integer)")
    assert "No new upgrade operations detected." in await alembic("check")
    app = alembic.project.root / "demo.py"
    app.write_text(
        app.read_text().replace("nullable=False),\n", 'nullable=False),\n    sa.Column("stars", sa.Integer),\n')
    )
    printed = await alembic("check", ok=False)
    assert "New upgrade operations detected: [('add_column', None, 'notes', Column('stars'" in printed
    await alembic("revision", "--autogenerate", "-m", "stars", "--rev-id", "0002")
    written = (alembic.project.migrations / "versions" / "0002_stars.py").read_text()
    body = re.search(r"def upgrade.*?# ### end", written, re.DOTALL)
    assert body is not None
    assert body[0].count("op.") == 1
    assert "op.add_column('notes', sa.Column('stars', sa.Integer(), nullable=True))" in body[0]
    await alembic("upgrade", "head")
    assert await revisions(fleet) == ["0002"] * 3
    assert "No new upgrade operations detected." in await alembic("check")
    await alembic("revision", "-m", "by hand", "--rev-id", "0003")
    assert "0002 -> 0003 (head), by hand" in await alembic("history")
    assert not [name for name in await databases(fleet) if "_x_" in name], "scratch databases are dropped"


async def databases(fleet: Fleet) -> list[str]:
    return [str(row[0]) for row in await fleet.fetch("acme", "SELECT datname FROM pg_database")]


async def test_offline_mode_prints_the_sql_once(alembic: Alembic, fleet: Fleet) -> None:
    alembic.project.add("0002", RATING, NO_RATING, down="0001")
    alembic.variables = {}  # no database is needed
    printed = await alembic("upgrade", "0001:head", "--sql")
    assert printed.count("ALTER TABLE notes ADD COLUMN rating INTEGER;") == 1
    assert "UPDATE alembic_version SET version_num='0002'" in printed
    assert "DROP COLUMN rating" in await alembic("downgrade", "0002:0001", "--sql")
    assert await revisions(fleet) == ["0001"] * 3


async def test_the_tenant_is_none_where_there_is_none(alembic: Alembic, fleet: Fleet) -> None:
    """Every command has it; with ``--sql`` it can be given."""
    body = """
    tenant = op.get_context().opts["tenant"]
    op.execute(f"SELECT '{tenant.slug if tenant else None}'")
    """
    alembic.project.add("0002", body, body, down="0001")
    alembic.project.configure(
        "target_metadata=target_metadata, process_revision_directives="
        "lambda context, revision, directives: print('sees', context.opts['tenant'])"
    )
    assert "sees None" in await alembic("revision", "--autogenerate", "--rev-id", "x1", "--head", "0001", "--splice")
    assert "sees None" in await alembic("check")
    printed = await alembic("-x", "tenant=acme", "upgrade", "0001:0002", "--sql")
    assert "SELECT 'acme';" in printed
    assert "Running upgrade 0001 -> 0002" in printed
    acme = await fleet.registry.find("acme")
    async with fleet.tenancy.internals.control.transaction() as connection:
        await connection.exec_driver_sql(
            "INSERT INTO tenancy.domains (domain, tenant_id, token, verified_at) "
            f"VALUES ('acme.test', '{acme.id}', 't', now())"
        )
    for name in ("acme.test", str(acme.id)):
        # as without --sql
        assert (await alembic("-x", f"tenant={name}", "current")).startswith("acme: ")
        assert "SELECT 'acme';" in await alembic("-x", f"tenant={name}", "upgrade", "0001:0002", "--sql")
    refused = await alembic("-x", "tenant=acme", "-x", "tenant=globex", "upgrade", "0002", "--sql", ok=False)
    assert "--sql prints the statements of one database" in refused
    assert "tenant 'nobody' does not exist" in await alembic(
        "-x", "tenant=nobody", "upgrade", "0002", "--sql", ok=False
    )
    alembic.variables = {}
    for arguments in (("upgrade", "0001:0002"), ("downgrade", "0002:0001")):
        assert "SELECT 'None';" in await alembic(*arguments, "--sql")
    assert "0002" in await alembic("stamp", "0002", "--sql")
    assert await revisions(fleet) == ["0001"] * 3


async def test_ensure_version_and_merge(alembic: Alembic, fleet: Fleet) -> None:
    await fleet.execute("acme", "DROP TABLE alembic_version")
    await alembic("ensure_version")
    assert await fleet.revision("acme") is None
    ini = alembic.project.ini
    ini.write_text(ini.read_text().replace("[alembic]\n", "[alembic]\nrevision_environment = true\n"))
    alembic.project.add("a1", down="0001")
    alembic.project.add("b1", down="0001")
    await alembic("merge", "heads", "-m", "merge", "--rev-id", "m1")
    await alembic("revision", "-m", "next", "--rev-id", "n1")
    assert "m1 -> n1 (head), next" in await alembic("history")


async def test_without_a_configuration_the_command_says_what_is_missing(alembic: Alembic) -> None:
    ini = alembic.project.ini
    ini.write_text(ini.read_text().replace("tenancy_app = demo:config", ""))
    alembic.variables = {}
    assert "FAILED: control_url: is not set" in await alembic("current", ok=False)
    alembic.variables = {"TENANCY_APP": "demo:notes"}
    assert "FAILED: " in await alembic("current", ok=False)


async def test_the_settings_are_those_of_the_project_that_the_ini_file_is_in(
    alembic: Alembic, fleet: Fleet, tmp_path: Path
) -> None:
    """Run from elsewhere, and inside another project; modules that they name are found there too."""
    root = alembic.project.root
    ini = alembic.project.ini.read_text()
    names = {"TENANCY_CONTROL_URL": "control_url", "TENANCY_SERVERS": "servers", "TENANCY_NAME_PREFIX": "name_prefix"}
    names["TENANCY_ENCRYPTION_KEYS"] = "encryption_keys"
    lines = [f'{names[variable]} = "{value}"\n' for variable, value in alembic.variables.items()]
    (root / "tenancy.toml").write_text("".join(lines) + 'metadata = "demo:metadata"\n')
    other = tmp_path / "other"
    other.mkdir()
    (other / "tenancy.toml").write_text('control_url = "postgresql://h/other"\ndefault_tier = "gold"\n')
    for text in (ini, ini.replace("tenancy_app = demo:config\n", "").replace("prepend_sys_path = %(here)s\n", "")):
        alembic.project.ini.write_text(text)
        for cwd in (tmp_path, other, alembic.project.migrations):
            done = await run_module(
                "alembic",
                "-c",
                str(alembic.project.ini),
                "current",
                cwd=cwd,
                env=shell.environment(PYTHONPATH=shell.python_path(shell.ROOT)),
            )
            assert (done.status, done.out) == (0, "".join(f"{slug}: 0001 (head)\n" for slug in TENANTS)), done.err


async def test_a_run_that_is_killed_can_be_run_again(alembic: Alembic, fleet: Fleet) -> None:
    alembic.project.add(
        "0002",
        """
        tenant = op.get_context().opts["tenant"]
        with op.get_context().autocommit_block():
            op.create_index("ix_notes_body", "notes", ["body"], postgresql_concurrently=True)
        op.add_column("notes", sa.Column("rating", sa.Integer))
        """,
        down="0001",
    )
    await fleet.provisioner.template("default")
    async with fleet.connect("globex") as holder:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("INSERT INTO notes (body) VALUES ('unfinished')")
        process = await alembic.start("-x", "concurrency=2", "upgrade", "head")
        invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
        await until(lambda: fleet.fetch("globex", invalid), [(1,)])
        await until(lambda: fleet.revision("initech"), "0002")
        os.kill(process.pid, signal.SIGKILL)
        await process.communicate()
        # the server notices, ends what it was doing for the dead process, and frees its lock
        await until(lambda: sessions(fleet, "globex"), [(1,)])
        assert await fleet.fetch("globex", invalid) == [(1,)]
        await transaction.commit()
    assert await fleet.revision("globex") == "0001"
    printed = await alembic("upgrade", "head")
    assert "1 migrated, 2 unchanged, 0 failed" in printed
    assert await revisions(fleet) == ["0002"] * 3
    for slug in TENANTS:
        assert await fleet.fetch(slug, invalid) == [(0,)]
        assert await fleet.recorded(slug) == "0002"


async def sessions(fleet: Fleet, slug: str) -> list[tuple[int, ...]]:
    """How many other sessions there are in a tenant's database."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    return await fleet.fetch(slug, query + " AND backend_type = 'client backend'")


# --- the same from Python -------------------------------------------------------------------------------------------


@pytest.fixture
def python(project: Project, config: TenancyConfig) -> Config:
    return Config(project.ini, attributes={"tenancy": config})


async def test_commands_work_inside_a_running_event_loop(fleet: Fleet, project: Project, python: Config) -> None:
    project.add("0002", RATING, NO_RATING, down="0001")
    command.upgrade(python, "head")
    assert await revisions(fleet) == ["0002"] * 3


async def test_commands_work_in_a_thread_without_one(fleet: Fleet, project: Project, python: Config) -> None:
    project.add("0002", RATING, NO_RATING, down="0001")
    await asyncio.to_thread(command.upgrade, python, "head")
    assert await revisions(fleet) == ["0002"] * 3


async def test_a_failure_is_ours_and_alembics(fleet: Fleet, project: Project, python: Config) -> None:
    project.add("0002", RATING, NO_RATING, down="0001")
    await fleet.execute("acme", "ALTER TABLE notes ADD rating text")
    with pytest.raises(FleetMigrationError) as raised:
        command.upgrade(python, "head")
    assert isinstance(raised.value, CommandError)
    assert list(raised.value.failures) == ["acme"]


async def test_a_database_cannot_be_chosen_by_env_py(fleet: Fleet, project: Project, python: Config) -> None:
    project.configure('url="postgresql://elsewhere/"')
    with pytest.raises(CommandError, match="leave out 'url'"):
        command.upgrade(python, "head")
