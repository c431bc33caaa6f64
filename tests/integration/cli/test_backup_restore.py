"""``tenancy backup restore``, ``undo-restore`` and ``tenancy operations``."""

from __future__ import annotations

from pathlib import Path

from tests.integration.cli.test_cli import Cli, cli
from tests.support.projects import NOTES, Project

__all__ = ["cli"]


async def test_a_backup_is_inspected_swapped_undone_and_made_another_tenant(cli: Cli, tmp_path: Path) -> None:
    """Each command says which one follows, and nothing is replaced without an answer."""
    store = {"TENANCY_BACKUP_STORE": f"file:{tmp_path / 'store'}"}
    await cli("init")
    Project(tmp_path).add("0001", NOTES, 'op.drop_table("notes")')
    assert (await cli("create", "acme")).status == 0
    made = await cli("backup", "run", "acme", "--json", **store)
    assert made.status == 0, made.err
    backup = made.json["done"][0]["id"]
    unanswered = await cli("backup", "restore", "acme", backup, stdin="", **store)
    assert (unanswered.status, "give it with --yes" in unanswered.err) == (1, True)
    latest = await cli("backup", "restore", "acme", "latest", stdin="n", **store)
    assert (latest.status, f"by backup {backup} of 20" in latest.out) == (1, True), latest
    unknown = await cli("backup", "restore", "nosuch", "latest", stdin="y", **store)
    assert (unknown.status, "Replace" in unknown.out, "does not exist" in unknown.err) == (1, False, True)

    # one in which something wrong was found is not meant
    damaged = (await cli("backup", "run", "acme", "--json", **store)).json["done"][0]
    (tmp_path / "store" / damaged["path"] / "dump.tar.age").write_bytes(b"x")
    assert (await cli("backup", "verify", damaged["id"], "--quick", **store)).status == 1
    status = await cli("backup", "status", "--json", **store)
    assert (status.status, status.json["backed_up"], status.json["overdue"]) == (0, 1, 0)
    latest = await cli("backup", "restore", "acme", "latest", stdin="n", **store)
    assert f"by backup {backup} of 20" in latest.out, latest

    waiting = await cli("backup", "restore", "acme", "latest", "--inspect", **store)
    assert waiting.status == 0, waiting.err
    assert "tenancy operations psql 1" in waiting.err
    looked = await cli("operations", "psql", "1", "--", "-At", "-c", "SELECT 4711", "-c", "DELETE FROM notes")
    assert (looked.status, looked.out.strip(), "read-only transaction" in looked.err) == (1, "4711", True)
    (listed,) = (await cli("operations", "list", "acme", "--json")).json["items"]
    assert (listed["operation"], listed["kind"], listed["state"], listed["step"]) == (
        1,
        "restore",
        "waiting",
        "inspect",
    )
    shown = await cli("operations", "show", "1")
    assert "tenancy operations resume 1" in shown.err
    assert backup in shown.out
    resumed = await cli("operations", "resume", "1", "--json")
    assert resumed.json["state"] == "done", resumed.err

    undone = await cli("backup", "undo-restore", "acme", "--yes")
    assert undone.status == 0, undone.err
    assert "swapping ..." in undone.err
    assert "with: tenancy backup undo-restore acme" in undone.err
    assert undone.out.startswith("operation")
    second = (await cli("backup", "restore", "acme", backup, "--inspect", "--json", **store)).json["operation"]
    ended = await cli("operations", "undo", str(second), "--yes")
    assert [line.split() for line in ended.out.splitlines()] == [
        ["operation", str(second)],
        ["kind", "restore"],
        ["tenant", "acme"],
        ["state", "undone"],
    ], ended.err
    copied = await cli("backup", "restore", "acme", backup, "--as", "acme-copy", "--json", **store)
    assert (copied.json["tenant"], copied.json["api_key"].startswith("ten_live_")) == ("acme-copy", True)
