"""A fail-over that Patroni makes."""

from __future__ import annotations

import asyncio

import asyncpg

from tenancy_orm import Tenancy, TenancyConfig
from tests.support.outages import Writers, go_on, running
from tests.support.patroni import patroni
from tests.support.waiting import until

SECONDS = 60.0


async def test_writes_go_on_at_the_node_that_patroni_promotes_and_none_is_lost(tenancy_config: TenancyConfig) -> None:
    """The leader's PostgreSQL is killed; the application, which names both nodes, is not restarted."""
    with patroni() as cluster:
        former = await asyncio.to_thread(cluster.wait_for_leader)
        admin = await asyncpg.connect(cluster.url, timeout=SECONDS)
        # as an operator is asked to: Patroni's role for replication is another role
        await admin.execute("REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC")
        await admin.close()
        config = tenancy_config.replace(
            servers={"patroni": cluster.url}, default_server="patroni", pool={"connect_timeout": 5.0}
        )
        tenancy = Tenancy(config)
        await tenancy.open(initialise=True)
        try:
            for slug in ("acme", "eve"):
                await tenancy.tenants.create(slug)
            writers = [Writers(tenancy, "acme"), Writers(tenancy, "acme", sync=True), Writers(tenancy, "eve")]
            async with running(*(writer.write for writer in writers)):
                await go_on(writers, seconds=SECONDS)
                former.crash()
                await until(lambda: all(writer.failures for writer in writers), seconds=SECONDS)
                await go_on(writers, seconds=SECONDS)
            for writer in writers:
                await writer.check()
            found = [node.members() for node in cluster.nodes]
            assert any(members.get(former.name, ("", ""))[0] != "leader" for members in found), found
        finally:
            await tenancy.close()
