"""Sessions that others wait for, in words."""

from __future__ import annotations

from tenancy_orm.migrations.waits import LockHolder, LockWatch


def test_a_holder_has_what_is_known_of_it() -> None:
    """A name is quoted: a session chooses its own. A prepared transaction has none."""
    known = LockHolder(7, "it's; DROP", "idle in transaction", 61.4, 3.2)
    assert str(known) == 'pid 7 (application "it\'s; DROP", idle in transaction for 3 s, transaction of 61 s)'
    assert str(LockHolder(7)) == "pid 7"
    assert str(LockWatch((LockHolder(0), LockHolder(7)))) == "blocked by a prepared transaction, pid 7"
    assert str(LockWatch(tuple(map(LockHolder, range(1, 9))))) == "blocked by pid 1, pid 2, pid 3, ..."
    assert str(LockWatch()) == ""
