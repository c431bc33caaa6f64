"""``timeouts``: other time limits for a part of a revision's statements."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final, Literal

from alembic import op
from sqlalchemy.exc import DBAPIError

from ..errors import MigrationError


class _Unchanged(Enum):
    UNCHANGED = "unchanged"


UNCHANGED: Final = _Unchanged.UNCHANGED


def milliseconds(seconds: float | None) -> str:
    """Return a time limit as PostgreSQL takes it; None is none, and what is less than a millisecond is one."""
    return "0" if not seconds else f"{max(1, round(seconds * 1000))}ms"


@contextmanager
def timeouts(
    *,
    lock: float | Literal[_Unchanged.UNCHANGED] | None = UNCHANGED,
    statement: float | Literal[_Unchanged.UNCHANGED] | None = UNCHANGED,
) -> Iterator[None]:
    """Give the statements of the body other time limits than those of the settings; for ``upgrade`` and ``downgrade``.

    Works with ``--sql`` and with plain Alembic, inside and outside of an ``autocommit_block``.

    ```python
    def upgrade():
        with op.get_context().autocommit_block(), timeouts(lock=600, statement=None):
            op.create_index("notes_body", "notes", ["body"], postgresql_concurrently=True, if_not_exists=True)
    ```

    Args:
        lock: PostgreSQL's lock_timeout in seconds: how long a statement waits for a lock. None is no limit.
        statement: Its statement_timeout in seconds: how long a statement takes, with its waits. None is no limit.

    Raises:
        MigrationError: a limit is negative.
    """
    given = {"lock_timeout": lock, "statement_timeout": statement}
    wanted = {name: seconds for name, seconds in given.items() if seconds is not UNCHANGED}
    for name, seconds in wanted.items():
        if seconds is not None and seconds < 0:
            raise MigrationError(f"timeouts: {name} must be at least 0, or None for no limit, not {seconds:g}")
    before: dict[str, str | None] = dict.fromkeys(wanted)
    if not op.get_context().as_sql:
        before = {name: op.get_bind().exec_driver_sql(f"SHOW {name}").scalar_one() for name in wanted}
    for name, seconds in wanted.items():
        op.execute(f"SET {name} = '{milliseconds(seconds)}'")
    try:
        yield
    except BaseException:
        # in a transaction that has failed, its end undoes the settings
        with contextlib.suppress(DBAPIError):
            _restore(before)
        raise
    _restore(before)


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        op.execute(f"RESET {name}" if value is None else f"SET {name} = '{value}'")


__all__ = ["timeouts"]
