"""An audit log with a past: entries as if they had been appended months ago."""

from __future__ import annotations

from datetime import datetime

from tenancy_orm.audit.log import AuditLog
from tenancy_orm.control.database import ControlDatabase

_FUNCTIONS = "SELECT pg_get_functiondef('tenancy.audit_{}'::regproc)"


async def age(control: ControlDatabase, audit: AuditLog, moment: datetime, entries: int) -> None:
    """Append entries as if it had been ``moment``, as the owner: the functions' clock is replaced for that time.

    Times never run backwards along the chain: the log must be empty, or as old.
    """
    async with control.engine.begin() as connection:
        definitions = []
        for name in ("append", "ensure_partitions"):
            definitions.append((await connection.exec_driver_sql(_FUNCTIONS.format(name))).scalar_one())
            at = f"timestamptz '{moment.isoformat()}'"
            await connection.exec_driver_sql(definitions[-1].replace("clock_timestamp()", at))
        # as if the partitions of the present had not been made yet
        await connection.exec_driver_sql("UPDATE tenancy.audit_head SET partitioned_until = 'epoch'")
        for number in range(entries):
            await audit.append(connection, action="test.old", after={"n": number})
        for definition in definitions:
            await connection.exec_driver_sql(definition)
