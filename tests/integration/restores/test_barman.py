"""One tenant at a point in time out of Barman's base backups and WAL: the real program, on PostgreSQL 16."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import ConfigurationError, RecoveryError, RecoveryTargetError
from tests.integration.restores.test_recovery import bodies, create, write
from tests.support.barman import Barman, barman
from tests.support.recovery import backup_directory, left_in, now, recovery_settings
from tests.support.replication import TestServer, primary_server


@pytest.fixture(scope="module")
def primary() -> Iterator[TestServer]:
    """A server of a version that Debian's Barman knows."""
    with primary_server(version=16) as server:
        yield server


@pytest.fixture
def directory() -> Iterator[Path]:
    """For Barman's files and recovered servers."""
    with backup_directory() as made:
        yield made


@pytest.fixture
def kept(primary: TestServer, directory: Path) -> Iterator[Barman]:
    """Barman, which receives the server's WAL."""
    with barman(primary, directory) as running:
        yield running


@pytest.fixture
async def tenancy(
    tenancy_config: TenancyConfig, primary: TestServer, kept: Barman, directory: Path
) -> AsyncIterator[Tenancy]:
    """A ``Tenancy`` that recovers by Barman."""
    settings = recovery_settings(primary, directory, provider="barman:main-{server}", barman_command=kept.command)
    opened = Tenancy(tenancy_config.replace(**settings))
    await opened.open(initialise=True)
    try:
        yield opened
    finally:
        await opened.close()


async def test_a_tenant_is_restored_by_barman_and_its_neighbours_are_newer(
    tenancy: Tenancy, primary: TestServer, kept: Barman, directory: Path
) -> None:
    """Base backup, streamed WAL, recovery; what is in the file that is still written is archived for it."""
    acme, _ = await create(tenancy, "acme"), await create(tenancy, "beta")
    assert acme.placement is not None
    early = now(primary)
    with pytest.raises(RecoveryTargetError, match="barman has no backup of server 'main-default'"):
        await tenancy.recovery.source("acme", early)
    kept.backup()
    with pytest.raises(RecoveryTargetError, match="is before barman's oldest backup of server 'main-default'"):
        await tenancy.recovery.source("acme", early)
    # Barman has the end of a backup in whole seconds
    window = await tenancy.recovery.window()
    assert window.oldest is not None
    while now(primary) <= window.oldest:
        pass
    await write(tenancy, "acme", "first")
    await write(tenancy, "beta", "old")
    target = now(primary)
    primary.query("DROP TABLE tags, notes", database=acme.placement.database)
    await write(tenancy, "beta", "new")
    source = await tenancy.recovery.source("acme", target)
    restored = await tenancy.restores.restore("acme", source)
    assert (restored.state, restored.differences) == ("done", ())
    assert await bodies(tenancy, "acme") == ["first"]
    assert await bodies(tenancy, "beta") == ["old", "new"]
    assert left_in(directory) == []
    newest = (await tenancy.recovery.window()).newest
    assert newest is not None and newest > target

    # a file that is lost: times after it cannot be reached
    kept.archive()
    await write(tenancy, "acme", "second")
    kept.archive()
    for path in sorted((directory / "barman").glob("main-default/wals/*/0*"))[-2:-1]:
        path.unlink()
    with pytest.raises(RecoveryTargetError, match="WAL of server 'main-default' is missing after file"):
        await tenancy.recovery.source("acme", now(primary) - timedelta(microseconds=1))

    # what Barman says is in the error, and so is that there is no Barman
    for settings, error, expected in (
        ({"provider": "barman"}, RecoveryError, "Unknown server 'default'"),
        ({"barman_command": "no-barman"}, ConfigurationError, r"'no-barman' cannot be run .* install the package"),
    ):
        async with Tenancy(tenancy.config.replace(recovery=settings)) as other:
            with pytest.raises(error, match=expected):
                await other.recovery.window()
