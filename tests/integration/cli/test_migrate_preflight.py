"""``tenancy migrate preflight``, and an upgrade that it stops."""

from __future__ import annotations

from pathlib import Path

from tests.integration.cli.test_cli import Cli, cli
from tests.support.projects import NOTES, Project

__all__ = ["cli"]


async def test_checks_from_the_shell(cli: Cli, tmp_path: Path) -> None:
    """Who does not pass is listed, the exit status says so, and JSON has the counts."""
    await cli("init")
    project = Project(tmp_path)
    project.add("0001", NOTES)
    for slug in ("acme", "globex"):
        await cli("create", slug)
    project.add(
        "0002",
        'op.add_column("notes", sa.Column("rating", sa.Integer))',
        down="0001",
        preflight="yield Check('no empty notes', \"SELECT FROM notes WHERE body = ''\")",
    )
    assert (await cli("migrate", "preflight")).status == 0
    wrote = await cli("sql", "INSERT INTO notes (body) VALUES ('')", "globex", "--write", "--yes")
    assert wrote.status == 0, wrote.err

    asked = await cli("migrate", "preflight")
    assert asked.status == 1
    summary, *table = asked.out.splitlines()
    assert summary.startswith("preflight of head: 2 tenants, 2 checks asked, 1 failed, ")
    assert [line.split("  ")[0] for line in table] == ["TENANT", "globex"]
    assert table[1].split() == ["globex", "0002", "no", "empty", "notes", "1", "row"]
    (_, globex) = (await cli("migrate", "preflight", "--json")).json["outcomes"]
    assert globex["findings"] == [{"revision": "0002", "check": "no empty notes", "rows": 1, "error": None}]

    refused = await cli("migrate", "upgrade")
    assert (refused.status, "none was touched: globex: 0002 no empty notes: 1 row" in refused.err) == (1, True)
    assert refused.out.split() == ["TENANT", "FOUND", "globex", "0002", "no", "empty", "notes:", "1", "row"]
    assert (await cli("migrate", "upgrade", "--json")).json == {
        "preflight": {"globex": "0002 no empty notes: 1 row"},
        "total": 2,
    }
    assert (await cli("migrate", "upgrade", "--tenant", "acme")).status == 0
    assert (await cli("migrate", "upgrade", "--skip-preflight")).status == 0
