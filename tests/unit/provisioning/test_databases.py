"""What needs no server."""

from __future__ import annotations

import dataclasses
from uuid import uuid4

import pytest

from tenancy_orm.provisioning import ReconcileReport
from tenancy_orm.provisioning.databases import lock_key
from tenancy_orm.provisioning.pipeline import tenant_key


def test_a_lock_key_is_a_bigint() -> None:
    """PostgreSQL's advisory lock keys are signed 64-bit numbers."""
    keys = {lock_key(str(i)) for i in range(10_000)}
    assert len(keys) == 10_000
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_a_lock_key_is_the_same_in_every_process() -> None:
    """It is a digest, not Python's seeded hash."""
    assert lock_key("prepare") == -1232916950082566004


def test_tenants_have_different_keys() -> None:
    """A tenant's key comes from its id."""
    first, second = uuid4(), uuid4()
    assert tenant_key(first) == tenant_key(first) != tenant_key(second)


def test_a_report_is_frozen() -> None:
    """A report is a value."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReconcileReport().errors = ("x",)  # type: ignore[misc]
