"""``tenancy.sync``: a ``Tenancy`` for synchronous code, on psycopg 3. Needs the extra ``sync``."""

from __future__ import annotations

from .tenancy import SyncTenancy

__all__ = ["SyncTenancy"]
