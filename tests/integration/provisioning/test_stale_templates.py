"""A template is used only while everything that it was built from is as it was; housekeeping drops the others."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import TemplateError
from tenancy_orm.migrations import AlembicSchema, inputs
from tenancy_orm.postgres import connections
from tenancy_orm.provisioning import Template
from tenancy_orm.provisioning.templates import building as templates
from tests.support.fleet import Fleet, fleet_config, open_fleet, until
from tests.support.postgres import Postgres
from tests.support.projects import Project

# they list the templates of the installation
pytestmark = pytest.mark.new_installation

REVISION = """
from pathlib import Path
from shop_{token}.helpers import table
for script in sorted((Path(__file__).parents[2] / "sql").glob("*.sql")):
    op.execute(script.read_text())
op.create_table(table(), sa.Column("id", sa.Integer))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name_prefix: str) -> Iterator[Project]:
    """A revision that runs the scripts of a directory, and imports a helper of the application, which imports another.

    The helper is imported already, as in an application that serves requests.
    """
    project = Project.create(tmp_path / "app")
    package = project.root / f"shop_{name_prefix}"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helpers.py").write_text("from .words import WORD\n\ndef table():\n    return WORD\n")
    (package / "words.py").write_text("WORD = 'things'\n")
    (package / "unrelated.py").write_text("")
    (project.root / "sql").mkdir()
    (project.root / "sql" / "views.sql").write_text("CREATE VIEW v AS SELECT 1 AS n")
    project.add("0001", REVISION.format(token=name_prefix))
    monkeypatch.syspath_prepend(project.root)
    importlib.import_module(f"shop_{name_prefix}.helpers")
    yield project
    for name in [name for name in sys.modules if name.startswith(f"shop_{name_prefix}")]:
        del sys.modules[name]


@pytest.fixture
def config(postgres: Postgres, name_prefix: str, control_url: str, project: Project) -> TenancyConfig:
    return fleet_config(postgres, control_url, name_prefix, project)


@pytest.fixture
async def fleet(config: TenancyConfig) -> AsyncIterator[Fleet]:
    async with open_fleet(config, initialise=True) as opened:
        await opened.create("acme")
        yield opened


def edit(path: Path, content: str) -> None:
    """Write a file so that its time differs, however coarse the file system's clock is."""
    path.write_text(content)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


async def states(fleet: Fleet) -> list[str]:
    return [template.state for template in await fleet.tenancy.templates.list()]


async def age(fleet: Fleet, name: str, by: timedelta) -> None:
    """Let a template's last use be longer ago."""
    async with fleet.tenancy.internals.control.transaction() as connection:
        await connection.execute(
            text("UPDATE tenancy.templates SET last_used_at = last_used_at - CAST(:by AS interval) WHERE name = :name"),
            {"by": by, "name": name},
        )


async def test_a_file_that_a_revision_used_makes_another_template(
    fleet: Fleet, project: Project, name_prefix: str
) -> None:
    """What it read, listed or imported, although no file of the migration directory changed."""
    schema = AlembicSchema(project.migrations)
    digest = schema.fingerprint()
    package, sql = project.root / f"shop_{name_prefix}", project.root / "sql"
    cache = package / "__pycache__" / "words.cpython-311.pyc"
    cache.parent.mkdir(exist_ok=True)
    changes: dict[str, Callable[[], object]] = {
        "script": lambda: edit(sql / "views.sql", "CREATE VIEW v AS SELECT 2 AS n"),
        "new script": lambda: (sql / "w.sql").write_text("CREATE VIEW w AS SELECT 2 AS n"),
        "missing script": (sql / "w.sql").unlink,
        "helper's own import": lambda: edit(package / "words.py", "WORD = 'other'\n"),
        "helper": lambda: edit(package / "helpers.py", "def table():\n    return 'other'\n"),
    }
    known = await fleet.provisioner.template("default")
    for kind, change in changes.items():
        change()
        # the attack: by the digest of the migration directory alone, nothing has changed
        assert schema.fingerprint() == digest
        template = await fleet.provisioner.template("default")
        assert (template == known) is (kind == "missing script"), kind
        assert await fleet.provisioner.template("default") == template, "it is built once"
        if kind != "new script":
            known = template
    await fleet.create("globex")
    assert [await fleet.fetch(slug, "SELECT n FROM v") for slug in ("acme", "globex")] == [[(1,)], [(2,)]]
    edit(package / "unrelated.py", "x = 1\n")
    cache.write_bytes(b"a cache")
    (project.root / ".env").write_text("X=1")
    assert await fleet.provisioner.template("default") == known


async def test_a_process_with_older_modules_makes_no_template_for_others(
    fleet: Fleet, config: TenancyConfig, project: Project, name_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are replaced in place, and a tenant is created before the application is restarted."""
    edit(project.root / f"shop_{name_prefix}" / "helpers.py", "def table():\n    return 'renamed'\n")
    old = await fleet.provisioner.template("default")
    await fleet.create("globex")
    tables = "SELECT count(*) FROM pg_tables WHERE tablename = 'renamed'"
    assert await fleet.fetch("globex", tables) == [(0,)], "the process has imported the former helper"
    assert await fleet.provisioner.template("default") == old, "it is built once"
    # the restart
    for name in [name for name in sys.modules if name.startswith(f"shop_{name_prefix}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(inputs, "_PROCESS", "another", raising=False)
    async with open_fleet(config) as restarted:
        await restarted.create("initech")
        assert await restarted.fetch("initech", tables) == [(1,)]


async def test_migrations_that_change_during_a_build_make_no_template(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a process with the former revisions would clone a template with later ones."""
    apply = AlembicSchema.apply

    async def slow_apply(schema: AlembicSchema, connect: templates.Connect) -> str | None:
        project.add("0003", "pass", down="0002")
        return await apply(schema, connect)

    project.add("0002", "pass", down="0001")
    monkeypatch.setattr(AlembicSchema, "apply", slow_apply)
    with pytest.raises(TemplateError, match="changed while the template"):
        await fleet.provisioner.template("default")
    assert len(await fleet.tenancy.templates.list()) == 1
    monkeypatch.setattr(AlembicSchema, "apply", apply)
    assert (await fleet.provisioner.template("default")).revision == "0003"


async def test_builds_at_once_do_not_mix_up_their_inputs(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one process, on two servers: the second ends while the first closes its connections."""
    close = connections.close

    async def slow_close(connection: connections.Connection) -> None:
        await close(connection)
        monkeypatch.setattr(fleet.provisioner._templates._schema, "_recorded", {"of": "another build"})

    monkeypatch.setattr(connections, "close", slow_close)
    await fleet.tenancy.templates.rebuild()
    async with fleet.tenancy.internals.control.connect() as connection:
        found = (await connection.execute(text("SELECT inputs FROM tenancy.templates WHERE NOT retired"))).scalar_one()
    assert "sql" in found and "of" not in found


async def test_the_same_project_elsewhere_uses_the_same_template(
    fleet: Fleet, config: TenancyConfig, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In /srv as in /app: names are relative, and times do not count."""
    before = await fleet.provisioner.template("default")
    shutil.copytree(project.root, tmp_path / "elsewhere" / "app", copy_function=shutil.copy)
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere" / "app"), *sys.path[1:]])
    async with open_fleet(config.replace(migrations=tmp_path / "elsewhere" / "app" / "migrations")) as other:
        assert await other.provisioner.template("default") == before


async def test_two_releases_keep_their_templates_and_a_superseded_one_is_dropped(
    fleet: Fleet, config: TenancyConfig, project: Project
) -> None:
    """The one that a process of the former release uses stays, however short the retention is."""
    old = await fleet.provisioner.template("default")
    edit(project.root / "sql" / "views.sql", "CREATE VIEW v AS SELECT 2 AS n")
    async with open_fleet(config.replace(retention={"template_seconds": 1})) as later:
        new = await later.provisioner.template("default")
        (current, other) = await later.tenancy.templates.list()
        assert (current.name, current.state, current.revision) == (new.name, "current", "0001")
        assert (other.name, other.state, other.last_used_by) == (old.name, "in use", current.last_used_by)
        assert current.built_at is not None and other.built_at is not None and current.built_at > other.built_at
        assert (current.size_bytes or 0) > 1_000_000
        await later.tenancy.run_housekeeping()
        assert await states(later) == ["current", "in use"]
        assert (await later.tenancy.templates.prune(unused_seconds=0)).removed == ()
        # the other release has ended
        await age(later, old.name, timedelta(hours=1))
        await age(later, new.name, timedelta(days=30))
        assert await states(later) == ["current", "superseded"]
        planned = await later.tenancy.templates.prune(dry_run=True)
        assert [one.name for one in planned.removed] == [old.name]
        assert await states(later) == ["current", "superseded"]
        report = await later.tenancy.run_housekeeping()
        assert report.errors == ()
        assert [one.name for one in report.chores["prune_templates"].removed] == [old.name]
        assert await states(later) == ["current"]
        (entry,) = await later.tenancy.audit.events(action="template.")
        assert entry.action == "template.remove"
        assert entry.detail == {"server": "default", "template": old.name}
        # one that is needed after all is built again
        fleet.provisioner._templates.invalidate(old)
        edit(project.root / "sql" / "views.sql", "CREATE VIEW v AS SELECT 1 AS n")
        await fleet.create("globex")
        assert await fleet.fetch("globex", "SELECT n FROM v") == [(1,)]


async def test_a_process_that_slept_looks_its_template_up_again(
    fleet: Fleet, config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has recorded no use meanwhile, and another release's housekeeping has dropped the template."""
    template = await fleet.provisioner.template("default")
    await age(fleet, template.name, timedelta(days=30))
    async with open_fleet(config.replace(extensions=("plpgsql",))) as other:
        assert [one.name for one in (await other.tenancy.templates.prune()).removed] == [template.name]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    await fleet.create("globex")


async def test_a_rebuilt_template_replaces_the_former_one(
    fleet: Fleet, config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process at once, in others when they record their use the next time."""
    async with open_fleet(config) as other:
        old = await other.provisioner.template("default")
        (new,) = await fleet.tenancy.templates.rebuild()
        assert new.name != old.name
        assert await fleet.provisioner.template("default") == new
        assert await other.provisioner.template("default") == old
        assert [(one.name, one.state) for one in await fleet.tenancy.templates.list()] == [
            (new.name, "current"),
            (old.name, "in use"),
        ]
    monkeypatch.setattr(templates, "USE_SECONDS", 0.05)
    async with open_fleet(config) as other:
        # a process that runs keeps its template, and learns of a rebuild when it records that
        assert await other.provisioner.template("default") == new
        await age(fleet, new.name, timedelta(days=1))

        async def is_recorded() -> bool:
            (first, _) = await fleet.tenancy.templates.list()
            return first.last_used_at is not None and first.last_used_at > datetime.now(UTC) - timedelta(hours=1)

        await until(is_recorded)
        (newest,) = await fleet.tenancy.templates.rebuild()
        await until(lambda: other.provisioner.template("default"), newest)
    _, entry = await fleet.tenancy.audit.events(action="template.rebuild")
    assert entry.detail == {"server": "default", "template": new.name, "revision": "0001"}


async def test_a_template_without_a_record_is_kept_for_a_time(fleet: Fleet, config: TenancyConfig) -> None:
    """One that an older version of this package built, or that a restored control database does not know."""
    template = await fleet.provisioner.template("default")
    async with fleet.tenancy.internals.control.transaction() as connection:
        await connection.execute(text("DELETE FROM tenancy.templates"))
    async with open_fleet(config) as later:
        new = await later.provisioner.template("default")
        assert new.name != template.name, "what it was built from is not known"
        for _ in range(2):
            assert (await later.tenancy.templates.prune(unused_seconds=3600)).removed == ()
        found: dict[str, Template] = {one.name: one for one in await later.tenancy.templates.list()}
        assert (found[template.name].state, found[template.name].built_at) == ("superseded", None)
        await age(later, template.name, timedelta(hours=2))
        assert [one.name for one in (await later.tenancy.templates.prune(unused_seconds=3600)).removed] == [
            template.name
        ]


async def test_a_server_that_does_not_answer_is_named(fleet: Fleet, config: TenancyConfig) -> None:
    servers = {**(config.servers or {}), "gone": "postgresql://nobody@127.0.0.1:1/postgres"}
    async with open_fleet(config.replace(servers=servers, pool={"connect_timeout": 2})) as later:
        report = await later.tenancy.templates.prune()
        assert report.removed == ()
        (error,) = report.errors
        assert error.startswith("gone: ")
        assert [one.state for one in await later.tenancy.templates.list(servers=["default"])] == ["current"]


@pytest.mark.new_installation
async def test_the_first_run_prepares_a_server_that_nothing_has_prepared(config: TenancyConfig) -> None:
    """A deployment upgrades before its first tenant is created: the role that owns the tables is not made yet."""
    async with open_fleet(config) as fleet:
        assert (await fleet.migrations.upgrade()).ok
        await fleet.create("acme")
        assert await fleet.revision("acme") == fleet.migrations.services.schema.head()
