"""What revisions of tests call: a test stops their server in the middle of one."""

from __future__ import annotations

from collections.abc import Callable

from alembic import op

from tenancy_orm.tenant import Tenant

_callbacks: dict[str, Callable[[], None]] = {}


def call_back(slug: str, callback: Callable[[], None]) -> None:
    """Have ``reached`` call this for a tenant."""
    _callbacks[slug] = callback


def forget() -> None:
    """Call nothing any more."""
    _callbacks.clear()


def reached() -> None:
    """Is called in a revision."""
    reached_by(op.get_context().opts["tenant"])


def reached_by(tenant: Tenant | None) -> None:
    """Is called in a data migration."""
    if tenant is not None and (callback := _callbacks.get(tenant.slug)) is not None:
        callback()


def session() -> int:
    """The process of the session that the revision runs in."""
    return int(op.get_bind().exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
