"""What is stored for one tenant opens nothing of another's, however the registry is rewritten."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, Tenant
from tenancy_orm.errors import MarkerMismatchError, SecretError
from tenancy_orm.secrets.keyring import Keyring

PLACEMENT = ("server", "database_name", "role_name", "sealed_password")


async def swap(tenancy: Tenancy, columns: tuple[str, ...], one: Tenant, other: Tenant) -> None:
    """Swap columns of two tenants' rows, as whoever can write to the registry could."""
    settings = ", ".join(f"{column} = other.{column}" for column in columns)
    statement = (
        f"UPDATE tenancy.tenants t SET {settings} FROM tenancy.tenants other "
        "WHERE (t.id = :one AND other.id = :other) OR (t.id = :other AND other.id = :one)"
    )
    async with tenancy.internals.control.transaction() as connection:
        # names are unique at every moment, so the guard of that index steps aside
        await connection.execute(text("DROP INDEX IF EXISTS tenancy.tenants_database_name_key"))
        await connection.execute(text(statement), {"one": one.id, "other": other.id})
    for tenant in (one, other):
        tenancy.internals.directory.invalidate(tenant_id=tenant.id)


async def two(tenancy: Tenancy) -> tuple[Tenant, Tenant]:
    """Two tenants, each with a note of its own."""
    tenants = []
    for slug in ("acme", "globex"):
        tenants.append((await tenancy.tenants.create(slug)).tenant)
        await tenancy.execute("INSERT INTO notes (body) VALUES (:body)", {"body": slug}, tenant=slug)
    return tenants[0], tenants[1]


@pytest.mark.parametrize("columns", [("sealed_password",), PLACEMENT])
async def test_swapped_credentials_open_for_neither_tenant(tenancy: Tenancy, columns: tuple[str, ...]) -> None:
    """The password alone, or all that leads to the database: refused before a connection is made."""
    await swap(tenancy, columns, *await two(tenancy))
    for slug in ("acme", "globex"):
        with pytest.raises(SecretError, match="another tenant"):
            await tenancy.fetch_value("SELECT body FROM notes", tenant=slug)


async def test_unbound_credentials_would_lead_to_the_other_tenant(
    tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With that layer off, the swapped password logs in to the other's database, where the marker refuses it."""
    monkeypatch.setattr(
        Keyring, "seal_password", lambda self, tenant_id, password: self.seal(password.encode(), associated=b"")
    )
    monkeypatch.setattr(
        Keyring, "open_password", lambda self, tenant_id, sealed: self.open(sealed, associated=b"").decode()
    )
    await swap(tenancy, PLACEMENT, *await two(tenancy))
    for slug in ("acme", "globex"):
        with pytest.raises(MarkerMismatchError):
            await tenancy.fetch_value("SELECT body FROM notes", tenant=slug)
