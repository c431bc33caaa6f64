"""Alembic's log lines are labelled with the tenant."""

from __future__ import annotations

import logging
import logging.config
import threading
from pathlib import Path

import pytest
from alembic.config import Config

from tenancy_orm.errors import ConfigurationError
from tenancy_orm.migrations.configuration import alembic_config
from tenancy_orm.migrations.logs import configure, labelled, quiet, unchanged
from tenancy_orm.migrations.scripts import load
from tests.support.projects import Project

alembic = logging.getLogger("alembic.runtime.migration")


def test_lines_are_labelled_inside_and_not_outside(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with labelled("acme"):
        alembic.info("Running %s", "1 -> 2")
        with labelled("100%"):
            alembic.info("Running %s", "2 -> 3")
    alembic.info("done")
    assert caplog.messages == ["[acme] Running 1 -> 2", "[100%] Running 2 -> 3", "done"]


def test_what_is_said_about_every_connection_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with labelled("acme"), quiet():
        alembic.info("Context impl PostgresqlImpl.")
        alembic.warning("but not this")
    assert caplog.messages == ["[acme] but not this"]


# --- an env.py that configures logging, as that of plain Alembic does -------------------------------------------------

FILE_CONFIG = """
from logging.config import fileConfig
from alembic import context
fileConfig(context.config.config_file_name)
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path)
    env = project.migrations / "env.py"
    env.write_text(FILE_CONFIG + env.read_text())
    return project


@pytest.mark.parametrize("failure", [False, True])
def test_reading_env_py_leaves_the_applications_logging_alone(project: Project, failure: bool) -> None:
    if failure:
        (project.migrations / "env.py").write_text(FILE_CONFIG)
    own, root = logging.getLogger("an.application"), logging.getLogger()
    functions = logging.config.fileConfig, logging.config.dictConfig
    handlers, level = list(root.handlers), root.level
    if failure:
        with pytest.raises(ConfigurationError):
            load(alembic_config(project.migrations))
    else:
        load(alembic_config(project.migrations))
    assert not own.disabled
    assert (root.handlers, root.level) == (handlers, level)
    assert (logging.config.fileConfig, logging.config.dictConfig) == functions


def test_other_threads_can_configure_logging_all_the_while() -> None:
    with unchanged():
        config = {"version": 1, "incremental": True, "loggers": {"of.a.thread": {"level": "ERROR"}}}
        logging.config.dictConfig(config)
        assert logging.getLogger("of.a.thread").level == logging.NOTSET
        thread = threading.Thread(target=logging.config.dictConfig, args=(config,))
        thread.start()
        thread.join()
        assert logging.getLogger("of.a.thread").level == logging.ERROR


def test_this_packages_loggers_are_enabled_although_env_py_disabled_them() -> None:
    logger = logging.getLogger("tenancy_orm.migrations")
    logger.disabled = True
    configure(Config())
    assert not logger.disabled
