"""``tenancy backup restore``, ``undo-restore`` and ``tenancy operations``."""

from __future__ import annotations

from pathlib import Path

from tests.integration.cli.test_cli import Cli, cli
from tests.support.projects import NOTES, Project

__all__ = ["cli"]


async def test_a_backup_is_restored_inspected_swapped_and_undone(cli: Cli, tmp_path: Path) -> None:
    """Each command says which one follows; nothing is replaced without an answer; what is purged stays so."""
    store = {"TENANCY_BACKUP_STORE": f"file:{tmp_path / 'store'}"}
    await cli("init")
    Project(tmp_path).add("0001", NOTES, 'op.drop_table("notes")')
    assert (await cli("create", "acme")).status == 0
    add = ("sql", "INSERT INTO notes (body) VALUES ('one')", "acme", "--write", "--yes")
    count = ("sql", "SELECT count(*) AS n FROM notes", "acme")

    async def rows() -> int:
        return int((await cli(*count)).out.split()[-1])

    assert (await cli(*add)).status == 0
    made = await cli("backup", "run", "acme", "--json", **store)
    assert made.status == 0, made.err
    backup = made.json["done"][0]["id"]
    assert (await cli(*add)).status == 0

    asked = await cli("backup", "restore", "acme", backup, stdin="n\n", **store)
    assert (asked.status, "nothing was changed" in asked.err) == (1, True)

    waiting = await cli("backup", "restore", "acme", "latest", "--inspect", **store)
    assert waiting.status == 0, waiting.err
    assert "tenancy operations psql 1" in waiting.err
    looked = await cli("operations", "psql", "1", "--", "-Atc", "SELECT count(*) FROM notes")
    assert (looked.out.strip(), looked.status) == ("1", 0), looked.err
    written = await cli("operations", "psql", "1", "--", "-c", "DELETE FROM notes")
    assert (written.status, "read-only transaction" in written.err) == (1, True)
    (listed,) = (await cli("operations", "list", "acme", "--json")).json["items"]
    assert (listed["operation"], listed["kind"], listed["state"], listed["step"]) == (
        1,
        "restore",
        "waiting",
        "inspect",
    )
    refused = await cli("backup", "restore", "acme", backup, "--yes", **store)
    assert (refused.status, "see: tenancy operations show 1" in refused.err) == (1, True)
    shown = await cli("operations", "show", "1")
    assert "tenancy operations resume 1" in shown.err
    assert f"'backup': '{backup}'" in shown.out or backup in shown.out
    assert (await cli("operations", "resume", "1", "--json")).json["state"] == "done"
    assert await rows() == 1

    undone = await cli("backup", "undo-restore", "acme", "--yes")
    assert (undone.status, await rows()) == (0, 2)
    assert "swapping ..." in undone.err
    assert "with: tenancy backup undo-restore acme" in undone.err
    assert undone.out.startswith("operation")
    copied = await cli("backup", "restore", "acme", backup, "--as", "acme-copy", "--json", **store)
    assert (copied.json["tenant"], copied.json["api_key"].startswith("ten_live_")) == ("acme-copy", True)

    waiting = await cli("backup", "restore", "acme", backup, "--inspect", "--json", **store)
    number = str(waiting.json["operation"])
    assert (await cli("operations", "undo", number, "--yes")).status == 0
    assert number in (await cli("operations", "list", "--state", "undone")).out
    await cli("delete", "acme")
    await cli("purge", "acme", "--yes")
    gone = await cli("backup", "restore", "acme-copy", backup, "--as", "other", **store)
    assert gone.status == 1, gone.out
    housekeeping = (await cli("housekeeping", "--json")).json
    assert (housekeeping["errors"], housekeeping["chores"]["reconcile"]["differences"]) == ([], [])
