"""What a PostgreSQL server may raise, by asyncpg, where it should have answered."""

from __future__ import annotations

from typing import Final

import asyncpg

SERVER_FAILURES: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What opening or using a connection raises, time-outs among it (``TimeoutError`` is an ``OSError``). The last one is
what asyncpg says of a connection that PostgreSQL has just ended, in the moment between its last message and the end of
its stream; an incompatible server says it too."""
