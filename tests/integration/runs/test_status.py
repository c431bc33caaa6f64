"""The status of a fleet from the registry: however many tenants there are, one query tells it."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

from tests.support.fleet import Fleet
from tests.support.projects import Project

TENANTS = 10_000
# ids before those of the fleet's own tenants
COPIES = """
INSERT INTO tenancy.tenants (id, slug, status, tier, server, database_name, role_name, sealed_password)
SELECT lpad(to_hex(n), 32, '0')::uuid, 'copy-' || n, 'provisioning', tier, server, 'none_' || n, 'none_' || n,
       sealed_password
  FROM tenancy.tenants CROSS JOIN generate_series(1, 10000) n WHERE slug = 'acme'
"""
# every tenth is behind; every hundredth is still being created, and not part of the status
ACTIVE = """
UPDATE tenancy.tenants SET status = 'active', schema_revision = CASE WHEN slug NOT LIKE '%5' THEN '0001' END
 WHERE status = 'provisioning' AND slug NOT LIKE '%00'
"""


async def test_one_query_tells_the_status_of_all_tenants(fleet: Fleet, project: Project) -> None:
    control = fleet.services.control
    async with control.transaction() as connection:
        await connection.execute(sa.text(COPIES))
        await connection.execute(sa.text(ACTIVE))
    await fleet.migrations.status()  # the revisions are read, the connection is open
    statements: list[str] = []

    def count(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "tenancy.tenants" in statement:  # other tasks ask other tables
            statements.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", count)
    try:
        started = time.perf_counter()
        found = await fleet.migrations.status()
        seconds = time.perf_counter() - started
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", count)
    assert len(statements) == 1, statements
    print(f"status of {len(found)} tenants in {seconds:.3f} s")
    assert len(found) == 3 + TENANTS - TENANTS // 100
    assert sum(one.at_head is False for one in found) == TENANTS // 10
    assert [one.slug for one in found[-3:]] == ["acme", "globex", "initech"]
