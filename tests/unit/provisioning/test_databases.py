"""What needs no server."""

from __future__ import annotations

import dataclasses
from uuid import uuid4

import pytest

from tenancy_orm.provisioning import ReconcileReport
from tenancy_orm.provisioning.pipeline import tenant_key


def test_tenants_have_different_keys() -> None:
    """A tenant's key comes from its id."""
    first, second = uuid4(), uuid4()
    assert tenant_key(first) == tenant_key(first) != tenant_key(second)


def test_a_report_is_frozen() -> None:
    """A report is a value."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReconcileReport().errors = ("x",)  # type: ignore[misc]
