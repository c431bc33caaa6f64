"""Roles that the grant hook lets into tenants' databases: a login that writes, and one of a group that may connect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg

from tenancy_orm.protocols import GrantTarget

PASSWORD = "of a guest"

Session = psycopg.Connection[Any]


@dataclass(frozen=True, slots=True)
class Guests:
    """The names of the roles, which are the same on each server."""

    writer: str
    group: str
    member: str

    @classmethod
    def named(cls, prefix: str) -> Guests:
        """Roles with names of their own for each installation."""
        return cls(f"{prefix}_etl", f"{prefix}_reporting", f"{prefix}_reader")

    @property
    def statements(self) -> str:
        """What creates them."""
        return (
            f"CREATE ROLE {self.writer} LOGIN PASSWORD '{PASSWORD}'; CREATE ROLE {self.group} NOLOGIN; "
            f"CREATE ROLE {self.member} LOGIN PASSWORD '{PASSWORD}' IN ROLE {self.group}"
        )

    @property
    def hook(self) -> Callable[[GrantTarget], Iterator[str]]:
        """A grant hook that lets them in."""

        def grants(target: GrantTarget) -> Iterator[str]:
            yield f"GRANT CONNECT ON DATABASE {target.database} TO {self.writer}, {self.group}"
            yield f"GRANT USAGE ON SCHEMA public TO {self.writer}"
            yield f"GRANT INSERT, SELECT ON notes TO {self.writer}"
            yield f"GRANT USAGE ON SEQUENCE notes_id_seq TO {self.writer}"

        return grants

    def let_in(self, url: str) -> list[str]:
        """Which of them can connect to a database, at the superuser's URL of it: "writer" and "member"."""
        found = []
        for name in ("writer", "member"):
            with suppress(psycopg.OperationalError):
                log_in(url, getattr(self, name)).close()
                found.append(name)
        return found


BOTH = ["writer", "member"]


def log_in(url: str, role: str) -> Session:
    """Connect as a guest, at the superuser's URL of the database."""
    return psycopg.connect(url, user=role, password=PASSWORD, autocommit=True)
