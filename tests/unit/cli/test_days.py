"""Numbers of days on the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from tenancy_orm.cli.app import app


@pytest.mark.parametrize(
    "arguments",
    [
        ("create", "acme", "--trial-days"),
        ("update", "acme", "--trial-days"),
        ("start-trial", "acme", "--days"),
        ("keys", "issue", "acme", "--expires-in-days"),
    ],
)
@pytest.mark.parametrize(("days", "status"), [("-3", 2), ("nan", 2), ("inf", 1), ("1e12", 1)])
def test_what_is_no_number_of_days_is_refused(arguments: tuple[str, ...], days: str, status: int) -> None:
    """Before anything is opened, with an error instead of a traceback."""
    done = CliRunner().invoke(app, [*arguments, days])
    assert done.exit_code == status
    assert "days" in done.output and "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
