"""``tenancy export``, as an operator types it."""

from __future__ import annotations

from pathlib import Path

from tests.integration.cli.test_cli import Cli, cli
from tests.integration.exports.conftest import Unpacked

__all__ = ["cli"]


async def test_an_operator_exports_a_tenant(cli: Cli, tmp_path: Path) -> None:
    await cli("init")
    await cli("create", "acme")
    await cli("sql", "INSERT INTO alembic_version VALUES ('x')", "acme", "--write")
    done = await cli("export", "acme", "--to", "acme.zip")
    assert (done.status, done.out.startswith("acme: ")) == (0, True), done.err
    assert "in acme.zip (" in done.out
    assert Unpacked(tmp_path / "acme.zip").manifest["tenant"]["slug"] == "acme"
    again = await cli("export", "acme", "--to", "acme.zip", "--json")
    assert (again.status, "nothing is overwritten" in again.err) == (1, True)
    csv = await cli("export", "acme", "--to", "acme", "--format", "csv", "--json")
    assert (csv.json["row_format"], csv.json["slug"], len(csv.json["snapshots"])) == ("csv", "acme", 1)
    assert (await cli("export", "acme", "--to", "b", "--format", "xml")).err.strip().endswith("give jsonl or csv")
    missing = await cli("export", "acme", "--to", "b", "--exclude", "nobody", "--json")
    assert (missing.status, '"error": "ExportError"' in missing.err) == (1, True)
    assert (await cli("export", "acme", "--to", "b.zip", "--resume")).status == 1
