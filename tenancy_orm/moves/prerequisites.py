"""What two servers need for a move by replication between them, asked before anything is made."""

from __future__ import annotations

from ..cancellation import run_to_completion
from ..errors import OperationError
from ..operations.progress import StepProgress
from ..postgres import connections
from ..provisioning import Provisioner
from ..provisioning.server_objects import roles
from .room import look
from .streams import MORE_WORKERS

LEAST_VERSION = 16
"""From this version of PostgreSQL on, a subscription changes tables with no more rights than their owner has."""


async def check_servers(provisioner: Provisioner, source: str, target: str, progress: StepProgress | None) -> int:
    """Refuse logical replication where it cannot work; returns the newer one of the two servers' major versions.

    Args:
        provisioner: Connects to servers.
        source: The name of the server that the tenant is on.
        target: The name of the one that it is moved to.
        progress: Called with why there will be no way back; None where nobody wants one.

    Raises:
        OperationError: it cannot.
    """
    versions = []
    for name in (source, target):
        connection = await provisioner.connect_admin(name, purpose="tenancy-move")
        try:
            version = connections.version(connection)
            level = await connection.fetchval("SELECT current_setting('wal_level')")
            left = await look(connection)
            superuser = await roles.is_superuser(connection)
            able = superuser or await connection.fetchval(
                "SELECT count(*) = 0 FROM pg_roles WHERE rolname = 'pg_create_subscription' "
                "AND NOT pg_has_role(current_user, oid, 'USAGE')"
            )
        finally:
            await run_to_completion(connections.close(connection))
        if version < LEAST_VERSION:
            raise OperationError(
                f"server {name!r} has PostgreSQL {version}: moves by replication need {LEAST_VERSION}, since a "
                "subscription of an older one has the rights of a superuser; use --offline"
            )
        if name == source and level != "logical":
            raise OperationError(
                f"server {name!r} has wal_level = {level}; set it to logical, which needs a restart, or use --offline"
            )
        if name == source and not left.workers and progress is not None:
            progress(f"there will be no way back by --rollback: server {name!r} has no worker left{MORE_WORKERS}")
        if name == target and level != "logical" and progress is not None:
            progress(f"there will be no way back by --rollback: server {name!r} has wal_level = {level}")
        if name == target and not able:
            raise OperationError(
                f"the administrator of server {name!r} may not create subscriptions; run there as a superuser: "
                "GRANT pg_create_subscription TO it; or use --offline"
            )
        versions.append(version)
    return max(versions)


__all__ = ["LEAST_VERSION", "check_servers"]
