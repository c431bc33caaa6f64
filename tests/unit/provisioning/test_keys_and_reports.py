"""Provisioning's parts that need no server."""

from __future__ import annotations

import dataclasses
from uuid import uuid4

import pytest

from tenancy_orm.provisioning import ReconcileReport
from tenancy_orm.provisioning.creation.pipeline import tenant_key


def test_tenants_have_different_keys() -> None:
    """The key of a tenant's lock is computed from its id."""
    first, second = uuid4(), uuid4()
    assert tenant_key(first) == tenant_key(first) != tenant_key(second)


def test_a_report_is_frozen() -> None:
    """A report cannot be changed."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReconcileReport().errors = ("x",)  # type: ignore[misc]
