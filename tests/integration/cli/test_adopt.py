"""``tenancy adopt``."""

from __future__ import annotations

from pathlib import Path

from tests.integration.cli.test_cli import Cli, cli
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project
from tests.support.sources import foreign_database

__all__ = ["cli"]

OLD = """
CREATE TABLE notes (id serial PRIMARY KEY, body varchar(1000) NOT NULL);
INSERT INTO notes (body) VALUES ('one'), ('two');
"""


async def test_a_database_is_compared_then_adopted(cli: Cli, postgres: Postgres, tmp_path: Path) -> None:
    """A difference is printed, and ends with status 1 until it is accepted; the URL's password is never shown."""
    await cli("init")
    Project(tmp_path).add("0001", NOTES, 'op.drop_table("notes")')
    async with foreign_database(postgres, OLD + "CREATE TABLE extra (n int)") as source:
        again = {"OLD_URL": source.url}
        for options in (["--dry-run"], []):
            found = await cli("adopt", "acme", "--from", "$OLD_URL", "--at", "0001", *options, **again)
            assert found.status == 1, found.out + found.err
            assert "  table extra should not exist" in found.out
            assert "nothing was changed" in found.out + found.err
            assert " 1 tables" not in found.out + found.err
            assert source.password not in found.out + found.err
        assert (await cli("list", "--json")).json["items"] == []
        done = await cli(
            *("adopt", "acme", "--from", "$OLD_URL", "--at", "0001", "--accept-differences", "--json"),
            **again,
        )
        assert done.status == 0, done.out + done.err
        assert (done.json["tenant"]["slug"], done.json["revision"], done.json["tables"][-1]["rows"]) == (
            "acme",
            "0001",
            2,
        )
        assert done.json["api_key"] and source.password not in done.out + done.err
        wrong = await cli("adopt", "globex", "--from", "postgresql://nobody:hidden@127.0.0.1:1/x", "--at", "0001")
        assert (wrong.status, "cannot be read" in wrong.err, "hidden" in wrong.err) == (1, True, False)


async def test_a_database_is_adopted_in_place(cli: Cli, postgres: Postgres, tmp_path: Path) -> None:
    """After a look, which lists others' rights, and a question, to which nobody here can answer."""
    await cli("init")
    Project(tmp_path).add("0001", NOTES, 'op.drop_table("notes")')
    async with foreign_database(postgres, OLD + "GRANT SELECT ON notes TO PUBLIC") as source:
        command = ("adopt", "acme", "--from", "$OLD_URL", "--at", "0001", "--in-place")
        looked = await cli(*command, "--dry-run", OLD_URL=source.url)
        assert looked.status == 1, looked.out + looked.err
        assert "rights that --revoke takes away: PUBLIC has SELECT on TABLE public.notes" in looked.out
        asked = await cli(*command, "--revoke", OLD_URL=source.url)
        assert (asked.status, "nothing was changed" in asked.err) == (1, True)
        done = await cli(*command, "--revoke", "--yes", "--json", OLD_URL=source.url)
        assert done.status == 0, done.out + done.err
        assert (done.json["in_place"], done.json["tenant"]["status"]) == (True, "active")
        (operation,) = (await cli("operations", "list", "--json")).json["items"]
        assert (operation["kind"], operation["state"]) == ("adopt", "done")
