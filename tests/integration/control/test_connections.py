"""The pool of the control database keeps no connection that does not work any more."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.errors import ControlUnavailableError


async def test_a_connection_that_a_refused_begin_has_left_is_not_kept(control_url: str) -> None:
    """The driver considers its transaction open, and the server does not: as after a BEGIN that was refused.

    One use may fail by that; the next one gets another connection.
    """
    control = ControlDatabase(control_url, pool_size=1)
    try:
        async with control.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            pid = await connection.scalar(text("SELECT pg_backend_pid()"))
            await driver.transaction().start()
            await driver.execute("ROLLBACK")
        with pytest.raises(ControlUnavailableError):
            async with control.transaction() as connection:
                await connection.execute(text("SELECT 1"))
        async with control.transaction() as connection:
            assert await connection.scalar(text("SELECT pg_backend_pid()")) != pid
    finally:
        await control.close()
