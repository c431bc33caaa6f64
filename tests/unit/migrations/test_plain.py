"""An env.py of plain Alembic gives its options to a fleet, and connects to nothing while it is read."""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import OperationalError

from tenancy_orm.errors import ConfigurationError
from tenancy_orm.migrations import envfile, logs
from tenancy_orm.migrations.configuration import alembic_config
from tenancy_orm.migrations.scripts import Environment, load
from tests.support.env_files import COOKBOOK, PLAIN, TEMPLATES, URL, make_project

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write an env.py into a project made by ``alembic init``, and return the directory of migrations."""

    def write(text: str) -> Path:
        directory = make_project(tmp_path, "generic")
        (directory / "env.py").write_text(text)
        return directory

    return write


def read(directory: Path) -> Environment:
    return load(alembic_config(directory))


@pytest.mark.parametrize("template", TEMPLATES)
def test_alembics_templates_work_as_they_are(tmp_path: Path, template: str) -> None:
    """Their URL is a placeholder that no engine can be made of."""
    directory = make_project(tmp_path, template)
    assert "driver://" in (tmp_path / "alembic.ini").read_text()
    assert read(directory).options == {"target_metadata": None}


@pytest.mark.parametrize("name", PLAIN)
def test_what_users_make_of_them_works_too(write: Write, name: str) -> None:
    """Whichever way it connects. Nothing answers at its URL, so that a connection would fail."""
    assert read(write(PLAIN[name])).options == {"target_metadata": None, "compare_type": False}


def test_the_attack_an_env_py_that_is_not_watched_connects_to_its_own_database(write: Write, tmp_path: Path) -> None:
    """This is what it does in plain Alembic."""
    write(PLAIN["own URL"])
    # its fileConfig would silence the loggers of other tests
    with logs.unchanged(), pytest.raises(OSError, match="Connect call failed"):
        command.upgrade(Config(tmp_path / "alembic.ini"), "head")


def test_other_engines_are_as_before(write: Write) -> None:
    """While an env.py is read, and afterwards."""
    original = Engine.connect, Engine.raw_connection, logging.config.fileConfig
    directory = write(COOKBOOK)
    read(directory)
    assert (Engine.connect, Engine.raw_connection, logging.config.fileConfig) == original
    with pytest.raises(OperationalError):
        create_engine(URL.replace("asyncpg", "psycopg")).connect()
    config = alembic_config(directory)
    load(config)
    assert "connection" not in config.attributes


def test_the_logging_of_the_application_is_not_changed(write: Write) -> None:
    """In env.py, fileConfig would silence every logger that alembic.ini does not name."""
    logger = logging.getLogger("shop.checkout")
    handlers = list(logging.getLogger().handlers)
    read(write(PLAIN["own URL"]))
    assert not logger.disabled
    assert logging.getLogger().handlers == handlers


BODY = """
from alembic import context
from sqlalchemy import create_engine, text
engine = create_engine("postgresql+psycopg://nobody:hunter2@127.0.0.1:1/own")
"""
RUN = "context.configure(connection=connection)\n    context.run_migrations()\n"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (f"with engine.connect() as connection:\n    connection.execute(text('SET x = 1'))\n    {RUN}", "'SET x = 1'"),
        (f"with engine.begin() as connection:\n    connection.exec_driver_sql('SELECT 1')\n    {RUN}", "'SELECT 1'"),
        (
            f"with engine.connect() as connection:\n    {RUN}    context.execute('CREATE SCHEMA app')\n",
            "'CREATE SCHEMA app'",
        ),
        (f"connection = engine.raw_connection()\nif True:\n    {RUN}", "a driver's connection of its own"),
        (f"for _ in 'ab':\n  with engine.connect() as connection:\n    {RUN}", "runs the migrations 2 times"),
        ("", r"neither context\.run_migrations nor environment\.run"),
        ("context.configure(url='postgresql://h/d')\n", r"neither context\.run_migrations nor environment\.run"),
        ("context.configure()\ncontext.run_migrations(engine_name='a')\n", "passes engine_name"),
        (
            "connection = engine.connect().execution_options(schema_translate_map={None: 'a'})\n",
            "schema_translate_map",
        ),
        ("engine.execution_options(schema_translate_map={None: 'a'}).connect()\n", "schema_translate_map"),
        ("from tenancy_orm import environment\ncontext.configure()\n", "calls context.configure"),
        ("import os\nos.environ['NO_SUCH_VARIABLE']\n", r"fails: KeyError: 'NO_SUCH_VARIABLE'"),
        ("engine = create_engine('driver://h/d')\n", "placeholder"),
        ("(", "fails: SyntaxError"),
    ],
)
def test_what_no_fleet_can_do_is_an_error_with_the_remedy(write: Write, lines: str, message: str) -> None:
    """And not a success that has touched no tenant."""
    directory = write(BODY + lines)
    with pytest.raises(ConfigurationError, match=message) as caught:
        read(directory)
    assert str(directory / "env.py") in str(caught.value)
    assert "hunter2" not in str(caught.value)


# --- the change that makes it call environment.run --------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_proposed_env_py_calls_run(tmp_path: Path, template: str) -> None:
    """The tail and one import are all that changes."""
    path = make_project(tmp_path, template) / "env.py"
    proposal = envfile.propose(path.read_text())
    assert proposal is not None and not envfile.calls_run(path)
    diff = proposal.diff("alembic/env.py").splitlines()
    assert [line for line in diff if line[0] in "+-"][2:] == [
        "+from tenancy_orm import environment",
        "-if context.is_offline_mode():",
        "-    run_migrations_offline()",
        "-else:",
        "-    run_migrations_online()",
        "+environment.run(context, target_metadata=target_metadata)",
    ]
    assert "run_migrations_online" in proposal.unused and "run_migrations_offline" in proposal.unused
    path.write_text(proposal.after)
    assert envfile.calls_run(path)
    assert read(path.parent).options == {"target_metadata": None}
    assert envfile.propose(proposal.after) is None


def test_options_are_taken_over() -> None:
    """Those of online mode, in as many lines as they need."""
    text = COOKBOOK.replace(
        "compare_type=False", "compare_type=False, include_object=lambda *a: True, version_table='v'"
    )
    proposal = envfile.propose(text)
    assert proposal is not None
    assert proposal.after.endswith(
        "environment.run(\n    context,\n    target_metadata=None,\n    compare_type=False,\n"
        "    include_object=lambda *a: True,\n    version_table='v',\n)\n"
    )
    assert proposal.unused == ("run_migrations_online", "run_migrations_offline")


@pytest.mark.parametrize(
    "text",
    [
        COOKBOOK.replace("compare_type=False", "include_object=chosen_here"),  # a local name
        COOKBOOK.replace("compare_type=False", "compare_type=True", 1),  # two ways to configure
        COOKBOOK.replace("if context.is_offline_mode():", "if True:"),
        "(",
        "",
    ],
)
def test_nothing_is_proposed_where_it_would_be_a_guess(text: str) -> None:
    assert envfile.propose(text) is None


def test_names_and_line_ends_of_the_file_are_kept() -> None:
    text = ("environment = 'prod'\n" + COOKBOOK).replace("\n", "\r\n")
    proposal = envfile.propose(text)
    assert proposal is not None
    ast.parse(proposal.after)
    assert "from tenancy_orm import environment as tenancy_environment\r\n" in proposal.after
    assert "\ntenancy_environment.run(" in proposal.after
    assert proposal.after.count("\n") == proposal.after.count("\r\n")


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("from tenancy_orm import Tenancy, environment", True),
        ("from tenancy_orm import (\n    Tenancy,\n    environment as e,\n)", True),
        ("from tenancy_orm.environment import run", True),
        ("import tenancy_orm.environment", True),
        ("# from tenancy_orm import environment", False),
        ("from tenancy_orm import Tenancy", False),
        ("from myapp import environment", False),
    ],
)
def test_an_env_py_of_ours_is_told_by_its_import(tmp_path: Path, line: str, ours: bool) -> None:
    (tmp_path / "env.py").write_text(f"{line}\n")
    assert envfile.calls_run(tmp_path / "env.py") is ours
