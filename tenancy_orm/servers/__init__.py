"""The PostgreSQL servers that hold tenants' databases: their rows, their addresses, and logins to them."""

from __future__ import annotations

from .live import Servers
from .server import Server

__all__ = ["Server", "Servers"]
