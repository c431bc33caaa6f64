"""Keys of advisory locks."""

from __future__ import annotations

from tenancy_orm.postgres.locks import lock_key


def test_a_lock_key_is_a_bigint() -> None:
    """PostgreSQL's advisory lock keys are signed 64-bit numbers."""
    keys = {lock_key(str(i)) for i in range(10_000)}
    assert len(keys) == 10_000
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_a_lock_key_is_the_same_in_every_process() -> None:
    """It is a digest, not Python's seeded hash."""
    assert lock_key("prepare") == -1232916950082566004
