"""The exceptions that mean a server did not answer as it should, or that a piece of work failed."""

from __future__ import annotations

from typing import Final

import asyncpg
from sqlalchemy.exc import SQLAlchemyError

from ..errors import TenancyError

SERVER_FAILURES: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What asyncpg raises when a connection cannot be opened or used, including time-outs (``TimeoutError`` is an
``OSError``). It raises the last one for a connection that PostgreSQL has just ended, between its last message and the
end of its stream, and for an incompatible server."""

FAILURES = (TenancyError, SQLAlchemyError, *SERVER_FAILURES)
"""What work on a server and on the control database may fail with, so that it is tried again later, and the work on
others goes on. An exception of another kind is a mistake in the code."""
