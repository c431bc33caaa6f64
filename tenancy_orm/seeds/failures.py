"""Errors of seeds and reference data as text: with the tenant, and with the remedy where a template lacks a table."""

from __future__ import annotations

from ..migrations.failures import describe
from ..postgres.errors import UNDEFINED_TABLE, sqlstate_of

_NO_TABLE = "; seeds and reference data need their tables: first make the revision (alembic revision --autogenerate)"


def reason_of(error: BaseException, tenant: str | None) -> str:
    """Return one line about an error in the database of ``tenant`` (a slug), or in the template where None."""
    remedy = _NO_TABLE if tenant is None and sqlstate_of(error) == UNDEFINED_TABLE else ""
    return f"failed: {describe(error)}{remedy}"


def place_of(tenant: str | None) -> str:
    """Return how a message ends that names the tenant."""
    return "" if tenant is None else f" for tenant {tenant!r}"


def describe_without(error: BaseException, tenant: str) -> str:
    """Return one line about an error, for a report that names the tenant beside it."""
    return describe(error).removesuffix(place_of(tenant))
