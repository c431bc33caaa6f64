"""Alembic's log lines are labelled with the tenant."""

from __future__ import annotations

import logging

import pytest

from tenancy_orm.migrations.logs import labelled, quiet

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
