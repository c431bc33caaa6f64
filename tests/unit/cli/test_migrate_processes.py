"""How many processes of a machine take part in a run."""

from __future__ import annotations

import pytest

from tenancy_orm.cli import migrate_processes
from tenancy_orm.cli.migrate_processes import MANY, MOST, wanted


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (64, MOST)])
def test_a_large_run_has_one_for_each_core_up_to_a_few(
    monkeypatch: pytest.MonkeyPatch, cores: int, expected: int
) -> None:
    monkeypatch.setattr(migrate_processes, "_cores", lambda: cores)
    assert (wanted(None, None, MANY), wanted(None, None, MANY - 1)) == (expected, 1)


def test_what_is_asked_for_holds_for_runs_of_any_size() -> None:
    assert (wanted(3, None, 1), wanted(None, 3, 1), wanted(1, 3, MANY)) == (3, 3, 1)
