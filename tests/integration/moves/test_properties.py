"""What a database has beside its contents: a copy on another server has the same."""

from __future__ import annotations

from typing import Any

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import OperationError
from tenancy_orm.tenant import Tenant
from tests.support.moving import Pair

pytestmark = pytest.mark.new_installation

FACTS = """
SELECT d.datlocprovider::text, d.datlocale, lower('Ä'), array_to_string(s.setconfig, ';') FROM pg_database d
  LEFT JOIN pg_db_role_setting s ON s.setdatabase = d.oid AND s.setrole = 0 WHERE datname = current_database()
"""
SETTINGS = (
    "TimeZone = 'Asia/Kathmandu'",
    """search_path = "$user", "Odd, ""name", public""",
    "DateStyle = 'SQL, DMY'",
    "my.own = 'x''y'",
    "default_transaction_read_only = on",
)


def facts(pair: Pair, tenant: Tenant) -> tuple[Any, ...]:
    return pair.rows(tenant, FACTS)[0]


def change_locale(pair: Pair, tenant: Tenant) -> None:
    """Give a database without texts another locale, which PostgreSQL does only when it makes one."""
    assert tenant.placement is not None
    change = "UPDATE pg_database SET datlocprovider = 'c', datlocale = NULL WHERE datname = %s"
    pair.on(tenant.placement.server).query(change, (tenant.placement.database,))


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
async def test_a_database_keeps_its_locale_and_its_settings(plane: Tenancy, pair: Pair, offline: bool) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    assert facts(pair, acme) == ("b", "C.UTF-8", "ä", None)
    change_locale(pair, acme)
    for setting in SETTINGS:
        pair.one.query(f'ALTER DATABASE "{acme.placement.database}" SET {setting}')
    before = facts(pair, acme)
    assert before[:3] == ("c", None, "Ä") and before[3].count(";") == 4
    await plane.moves.move("acme", to="two", offline=offline)
    assert facts(pair, await plane.tenants.get("acme")) == before
    await plane.moves.confirm("acme")


async def test_settings_that_the_new_server_refuses_are_named(
    plane: Tenancy, moving: TenancyConfig, pair: Pair
) -> None:
    """Before anything is copied."""
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    pair.one.query(f"ALTER DATABASE \"{acme.placement.database}\" SET work_mem = '8MB'")
    # as a server of another version, or with another extension, may know it
    pair.one.query("UPDATE pg_db_role_setting SET setconfig = setconfig || '{unheard_of=1}' WHERE setrole = 0")
    with pytest.raises(OperationError, match=r"server 'two' refuses settings .*: unheard_of \(42704\)"):
        await plane.moves.move("acme", to="two")
    assert [one.step for one in await plane.moves.list("acme")] == ["copying"]
    assert pair.left(moving.name_prefix) == []
    pair.one.query(f'ALTER DATABASE "{acme.placement.database}" RESET ALL')
    await plane.moves.move("acme", to="two")
