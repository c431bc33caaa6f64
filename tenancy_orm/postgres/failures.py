"""The exceptions that mean a server did not answer as it should."""

from __future__ import annotations

from typing import Final

import asyncpg

SERVER_FAILURES: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What asyncpg raises when a connection cannot be opened or used, including time-outs (``TimeoutError`` is an
``OSError``). It raises the last one for a connection that PostgreSQL has just ended, between its last message and the
end of its stream, and for an incompatible server."""
