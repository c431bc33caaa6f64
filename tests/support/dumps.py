"""Dumps of tenants' databases by ``pg_dump``, as a backup has them."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

from tenancy_orm.postgres.connections import version
from tenancy_orm.postgres.programs import Programs, find_programs
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres


async def dump(fleet: Fleet, slug: str, directory: Path, *options: str) -> Path:
    """Dump a tenant's database to a directory, as the administrator of its server."""
    place = (await fleet.registry.find(slug)).placement
    assert place is not None
    async with fleet.connect(slug) as connection:
        programs = find_programs(version(connection))
    dsn = fleet.services.servers[place.server].dsn
    assert dsn.user is not None and dsn.password is not None
    environment = dsn.environment(user=dsn.user, database=place.database, purpose="test")
    await asyncio.to_thread(
        subprocess.run,
        [programs.path("pg_dump"), "--format=directory", *options, f"--file={directory}"],
        check=True,
        capture_output=True,
        env={**os.environ, **environment, "PGPASSWORD": dsn.password},
    )
    return directory


def programs_of(postgres: Postgres) -> Programs:
    """The programs of the server's version, ``pg_restore`` and others."""
    return find_programs(int(postgres.version.partition(".")[0]))


def rewrite(archive: Path, statement: str, other: str) -> None:
    """Put another statement in the place of one of a dump, as somebody who writes dumps may."""
    contents = (archive / "toc.dat").read_bytes()
    assert statement.encode() in contents and len(other) <= len(statement)
    (archive / "toc.dat").write_bytes(contents.replace(statement.encode(), other.ljust(len(statement), "-").encode()))


async def restored_copy(postgres: Postgres, control_url: str) -> str:
    """Restore a dump of a control database, as it is now, into a new database, and return that one's URL."""
    programs, url = programs_of(postgres), await postgres.create_database(postgres.new_name())

    def copy() -> None:
        dumped = subprocess.run(
            [programs.path("pg_dump"), "--format=custom", "--no-owner", "--no-acl", control_url],
            check=True,
            capture_output=True,
        )
        subprocess.run(
            [programs.path("pg_restore"), "--exit-on-error", f"--dbname={url}"],
            check=True,
            capture_output=True,
            input=dumped.stdout,
        )

    await asyncio.to_thread(copy)
    return url
