"""``tenancy sql``, ``each``, ``run`` and ``url``: every tenant from the shell."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import os
import signal
import sys
from pathlib import Path

import asyncpg
import pytest

from tests.integration.cli.test_cli import COMMAND, Cli, cli
from tests.support.postgres import Postgres
from tests.support.shell import processes_in
from tests.support.waiting import HANGS, until

__all__ = ["cli"]

TYPES = """
SELECT '0b1f4f5e-3f2c-4d7e-9a55-0d6f0f0f0f0f'::uuid AS id, '2026-01-02 03:04:05+02'::timestamptz AS at,
       12.50::numeric AS price, 12345678901234567890.123456789::numeric AS exact, 'NaN'::numeric AS nan,
       7::numeric AS seven, '\\xdead'::bytea AS data, ARRAY[1, NULL, 3] AS list, '{"a": [1, null]}'::jsonb AS doc,
       'null'::jsonb AS jnull, NULL::int AS nothing, '1 day 2 hours 0.5 s'::interval AS span, true AS yes,
       '10.0.0.0/8'::cidr AS net, '[1,5)'::int4range AS range, '2026-01-02'::date AS day, 1 AS twin, 2 AS twin,
       ARRAY['{"b": 1}'::jsonb] AS docs, E'a\\nb' AS lines, '=1+1' AS formula, '-5' AS negative
"""


async def test_one_statement_on_many_tenants(cli: Cli, tmp_path: Path, postgres: Postgres) -> None:
    """One table with a tenant column; JSON typed; CSV that a spreadsheet does not calculate; audited; bounded."""
    await cli("init")
    for slug, tier in (("acme", "free"), ("globex", "pro"), ("initech", "free")):
        await cli("create", slug, "--tier", tier)
    nothing = await cli("sql", "SELECT 1")
    assert (nothing.status, "no tenants are named" in nothing.err) == (1, True)
    for wrong in (("sql",), ("sql", "SELECT 1", "acme", "--all"), ("sql", "SELECT 1", "acme", "--csv", "--json")):
        assert (await cli(*wrong)).status == 1
    table = await cli("sql", "SELECT n, 'x' AS \"a\tb\" FROM generate_series(1, 2) AS n", "--all")
    assert table.status == 0, table.err
    assert [line.split()[:2] for line in table.out.splitlines()] == [
        ["TENANT", "N"],
        *([slug, str(n)] for slug in ("acme", "globex", "initech") for n in (1, 2)),
    ]
    assert (await cli("sql", "SELECT 1 AS n", "--tier", "pro")).out.split() == ["TENANT", "N", "globex", "1"]
    unknown = await cli("sql", "SELECT 1", "--tier", "gold")
    assert (unknown.status, "gold" in unknown.err) == (1, True)
    none = await cli("sql", "SELECT 1", "--status", "suspended")
    assert (none.status, none.out, "there are no tenants" in none.err) == (0, "", True)

    (tmp_path / "q.sql").write_text(TYPES)
    (typed,) = (await cli("sql", "--file", "q.sql", "acme", "--json")).json
    assert typed["rows"] == [
        {
            "id": "0b1f4f5e-3f2c-4d7e-9a55-0d6f0f0f0f0f",
            "at": "2026-01-02T01:04:05+00:00",
            "price": 12.5,
            "exact": "12345678901234567890.123456789",
            "nan": "NaN",
            "seven": 7,
            "data": "\\xdead",
            "list": [1, None, 3],
            "doc": {"a": [1, None]},
            "jnull": None,
            "nothing": None,
            "span": "P1DT7200.5S",
            "yes": True,
            "net": "10.0.0.0/8",
            "range": "[1,5)",
            "day": "2026-01-02",
            "twin": 1,
            "twin_2": 2,
            "docs": [{"b": 1}],
            "lines": "a\nb",
            "formula": "=1+1",
            "negative": "-5",
        }
    ]
    text = (await cli("sql", "-f", "-", "--tenant", "acme", "--csv", stdin=TYPES)).out
    header, row = csv.reader(io.StringIO(text))
    fields = dict(zip(header, row, strict=True))
    assert (fields["tenant"], fields["lines"], fields["formula"], fields["negative"]) == ("acme", "a\nb", "'=1+1", "-5")
    assert (fields["price"], fields["doc"], fields["yes"], fields["nothing"]) == (
        "12.50",
        '{"a": [1, null]}',
        "true",
        "",
    )

    # only what --param names is a parameter
    asked = """SELECT :n + 1 AS sum, CAST(:who AS text) AS who, '{"a":1}'::jsonb AS doc, '12:30'::time AS at"""
    bound = await cli("sql", asked, "acme", "-p", "n=41", "-p", "who=a=b", "--json")
    assert bound.json[0]["rows"] == [{"sum": 42, "who": "a=b", "doc": {"a": 1}, "at": "12:30:00"}]
    assert (await cli("sql", "SELECT 1", "acme", "-p", "x=secret-value")).status == 1

    # partial failures, and columns that only some have
    own = (await cli("show", "globex", "--json")).json["database"]
    partial = await cli(
        "sql", f"SELECT 1 / CASE current_database() WHEN '{own}' THEN 0 ELSE 1 END AS n", "--all", "--json"
    )
    assert partial.status == 1
    assert [bool(one.get("error")) for one in partial.json] == [False, True, False]
    assert partial.json[1]["error"]["sqlstate"] == "22012"
    assert "globex: 22012 division by zero" in partial.err and "failed for 1 of 3 tenants" in partial.err

    # the same error once, with its remedy
    for arguments, code, message, remedy in (
        (
            ("SET search_path = public",),
            "",
            "the statement returns no rows, so it was not executed; to let it write",
            "--write",
        ),
        (("SELECT :id",), "42601 ", 'syntax error at or near ":"', "no value was given for :id; give --param id=..."),
        (("SELECT 1 WHERE 1 = :id", "-p", "id=x"), "22000 ", "invalid input for query argument", ":id is text; for"),
    ):
        failed = await cli("sql", *arguments, "--all")
        lines = failed.err.splitlines()
        assert (failed.status, lines[0].startswith(f"acme, globex, initech: {code}{message}")) == (1, True), failed.err
        assert "failed for 3 of 3 tenants" in lines[1]
        assert remedy in failed.err
    dated = await cli("sql", "SELECT CAST(CAST(:on AS text) AS date) AS day", "acme", "-p", "on=2026-01-02", "--json")
    assert dated.json[0]["rows"] == [{"day": "2026-01-02"}], dated.err

    # databases that have drifted apart
    for slug, made in (("acme", "a, 2 AS b"), ("globex", "c, 'x' AS a"), ("initech", "a WHERE false")):
        database = (await cli("show", slug, "--json")).json["database"]
        async with postgres.connect(database) as connection:
            await connection.execute(f"CREATE TABLE public.drifted AS SELECT 1 AS {made}")
            await connection.execute("GRANT SELECT ON public.drifted TO PUBLIC")
    drifted = await cli("sql", "SELECT * FROM public.drifted", "--all", "--csv")
    assert drifted.out.splitlines() == ["tenant,a,b,c", "acme,1,2,", "globex,x,,1"]

    more = await cli("sql", "SELECT n FROM generate_series(1, 9) AS n", "acme", "--max-rows", "2", "--csv")
    assert (more.out.split(), "there are more" in more.err) == (["tenant,n", "acme,1", "acme,2"], True)
    slow = await cli("sql", "SELECT pg_sleep(60)", "acme", "--timeout", "0.2s")
    assert (slow.status, "57014" in slow.err) == (1, True)

    # read-only, unless --write, which asks
    (await cli("sql", "SELECT 1", "acme", "--write", "--yes")).out.index("acme")
    refused = await cli("sql", "SELECT lo_create(0)", "acme")
    asked_first = await cli("sql", "SELECT lo_create(4242) AS oid", "--all", "--write", stdin="n\n")
    assert (refused.status, asked_first.status, "acme, globex, initech" in asked_first.err + asked_first.out) == (
        1,
        1,
        True,
    )
    count = "SELECT count(*) AS n FROM pg_largeobject_metadata"
    assert [one["rows"] for one in (await cli("sql", count, "--all", "--json")).json] == [[{"n": 0}]] * 3
    written = await cli("sql", "SELECT lo_create(4242) AS oid", "--all", "--write", "--yes")
    assert written.out.split() == ["TENANT", "OID", "acme", "4242", "globex", "4242", "initech", "4242"]
    assert [one["rows"] for one in (await cli("sql", count, "--all", "--json")).json] == [[{"n": 1}]] * 3

    entries = (await cli("audit", "list", "--action", "fleet.query", "--limit", "1000", "--json")).json
    last = next(one for one in entries if one["detail"]["write"])
    assert last["actor"]["kind"] == "operator"
    assert last["detail"]["statement"] == "SELECT lo_create(4242) AS oid"
    assert last["detail"]["tenants"] == ["acme", "globex", "initech"]
    assert "a=b" not in json.dumps(entries)


async def test_a_reader_that_leaves_is_no_error_of_the_program(cli: Cli, tmp_path: Path) -> None:
    """``tenancy sql ... | head -1``: no traceback."""
    await cli("init")
    await cli("create", "acme")
    variables = tmp_path / "environment.json"
    (tmp_path / "dump.py").write_text(f"import json, os\njson.dump(dict(os.environ), open({str(variables)!r}, 'w'))\n")
    await cli(program=("dump.py",))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *COMMAND,
        "sql",
        "SELECT repeat('x', 2000) FROM generate_series(1, 900)",
        "acme",
        cwd=tmp_path,
        env=json.loads(variables.read_text()),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    async with asyncio.timeout(60):
        await process.stdout.readexactly(100)
        process.stdout._transport.close()  # type: ignore[attr-defined]
        errors = (await process.stderr.read()).decode()
        await process.wait()
    assert "Traceback" not in errors and "BrokenPipe" not in errors, errors


PROGRAM = """
import asyncio, os, sys
import asyncpg

async def main():
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    print("one", sys.argv[1], await connection.fetchval("SELECT current_user = current_database()"))
    print("two", sorted(n for n in os.environ if n.startswith("TENANCY_")), flush=True)
    print("an error", file=sys.stderr)
    sys.stdout.write("no newline")
    await connection.close()
    # libpq's variables lead to the same database
    again = await asyncpg.connect()
    assert await again.fetchval("SELECT session_user") == os.environ["PGUSER"]
    await again.close()
    if os.environ["TENANCY_TENANT_SLUG"] in sys.argv[2:]:
        raise SystemExit(3)

asyncio.run(main())
"""


async def test_a_command_for_each_tenant(cli: Cli, tmp_path: Path) -> None:
    """With a login of its own in the environment, which is gone afterwards; output by line; failures listed."""
    await cli("init")
    for slug in ("acme", "globex", "initech"):
        await cli("create", slug)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = ("--", sys.executable, "program.py")
    for wrong in (
        ("each", "--all"),
        ("each", *command),
        ("each", "acme", "--all", *command),
        ("each", "acme", "--", ""),
    ):
        assert (await cli(*wrong)).status == 1, wrong
    assert "no program" in (await cli("each", "--all", "--", "no-such-program")).err
    done = await cli("each", "acme", "-t", "globex", *command, "--all")
    assert done.status == 0, done.err
    for slug in ("acme", "globex"):
        assert [line for line in done.out.splitlines() if line.startswith(slug)] == [
            f"{slug}: one --all True",
            f"{slug}: two ['TENANCY_TENANT_ID', 'TENANCY_TENANT_SLUG']",
            f"{slug}: no newline",
        ]
        assert f"{slug}: an error" in done.err.splitlines()
    failed = await cli("each", "--all", "--concurrency", "1", *command, "x", "acme")
    assert failed.status == 1
    assert "acme: exit status 3" in failed.err and "not started: globex, initech" in failed.err
    going = await cli("each", "--all", "-k", *command, "x", "acme")
    assert (going.status, going.out.count("one x True")) == (1, 3)
    assert "failed for 1 of 3 tenants" in going.err

    # nothing is left, and the log says who had which login, but no password
    assert (await cli("reconcile", "--check", "--json")).json["orphans"] == []
    entries = (await cli("audit", "list", "--action", "tenant.login", "--limit", "100", "--json")).json
    assert {one["slug"] for one in entries} == {"acme", "globex", "initech"}
    assert {one["detail"]["purpose"] for one in entries} == {"tenancy-each"}
    assert {tuple(sorted(one["detail"])) for one in entries} == {("expires_at", "purpose", "role")}

    made = await cli("url", "acme", "--ttl", "1m", "--json")
    assert made.status == 0, made.err
    connection = await asyncpg.connect(made.json["url"])
    assert await connection.fetchval("SELECT session_user") == made.json["role"]
    await connection.close()
    plain = await cli("url", "acme")
    assert plain.out.startswith("postgresql://") and plain.out.count("\n") == 1 and "valid until" in plain.err
    assert (await cli("url", "acme", "--ttl", "30d")).status == 1
    await cli("suspend", "acme")
    with pytest.raises(asyncpg.PostgresError):
        await asyncpg.connect(made.json["url"])


def sleeping(directory: Path) -> list[str]:
    """What the commands have started, and still runs."""
    return [one for one in processes_in(directory) if one.endswith(": sleep 600")]


def commands(directory: Path) -> list[str]:
    """The commands themselves that still run, and what they have forked and is not yet another program."""
    return [one for one in processes_in(directory) if ": sh -c " in one]


def end_all(directory: Path) -> None:
    """End the commands and what they have started: each is a process group of its own."""
    for one in sleeping(directory) + commands(directory):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(os.getpgid(int(one.partition(":")[0])), signal.SIGKILL)


async def until_begun(directory: Path, *, remaining: bool = True) -> None:
    """Wait until two commands have started what they start, and have ended if they are not to remain.

    A shell writes its line before it forks.
    """
    await until(lambda: len(sleeping(directory)) == 2 and bool(commands(directory)) == remaining)


async def test_a_signal_ends_the_commands_and_their_logins(cli: Cli, tmp_path: Path) -> None:
    """What a command has started ends with it."""
    await cli("init")
    await cli("create", "acme")
    await cli("create", "globex")
    variables = tmp_path / "environment.json"
    (tmp_path / "dump.py").write_text(f"import json, os\njson.dump(dict(os.environ), open({str(variables)!r}, 'w'))\n")
    await cli(program=("dump.py",))
    script = "echo begun; sleep 600 & wait"
    # the second one has ended when the signal comes, and what it has started has not
    for number, remains in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *COMMAND,
            *("each", "--all", "--", "sh", "-c", script if remains else script.removesuffix(" wait")),
            cwd=tmp_path,
            env=json.loads(variables.read_text()),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(HANGS):
                begun = [await process.stdout.readline() for _ in range(2)]
            assert sorted(begun) == [b"acme: begun\n", b"globex: begun\n"]
            await until_begun(tmp_path, remaining=remains)
            process.send_signal(number)
            async with asyncio.timeout(HANGS):
                await process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            end_all(tmp_path)
            raise
        assert process.returncode != 0
        await until(lambda: not sleeping(tmp_path))
    assert (await cli("reconcile", "--check", "--json")).json["orphans"] == []

    # killed, it can end nothing: its logins expire, and reconcile drops them
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *COMMAND,
        *("each", "--all", "--ttl", "2s", "--", "sh", "-c", script),
        cwd=tmp_path,
        env=json.loads(variables.read_text()),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(HANGS):
            for _ in range(2):
                await process.stdout.readline()
        await until_begun(tmp_path)
    finally:
        process.kill()
        await process.wait()
        end_all(tmp_path)

    async def expired() -> bool:
        return len((await cli("reconcile", "--check", "--json")).json["orphans"]) == 2

    await until(expired)
    assert len((await cli("housekeeping", "--json")).json["chores"]["reconcile"]["orphans"]) == 2
    assert (await cli("reconcile", "--check", "--json")).json["orphans"] == []


FUNCTIONS = """
from __future__ import annotations
from dataclasses import dataclass
import tenancy_orm
from tenancy_orm import Tenancy, Tenant, current_tenant
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

def plain(tenant, greeting, times=1):
    assert tenant.id == current_tenant().id
    return f"{greeting} {tenant.slug}" * times

async def counted(db: AsyncSession, it: Tenancy, who: Tenant):
    assert isinstance(it, Tenancy) and who.slug == current_tenant().slug
    await db.execute(text("SELECT lo_create(77)"))
    if who.slug == "globex":
        raise ValueError("not this one")
    return {"n": (await db.execute(text("SELECT count(*) FROM pg_largeobject_metadata"))).scalar()}

async def left(session):
    return await session.scalar(text("SELECT count(*) FROM pg_largeobject_metadata"))
"""


async def test_a_function_for_each_tenant(cli: Cli, tmp_path: Path) -> None:
    """Bound, with the objects that its signature asks for; committed where it succeeds; failures with a traceback."""
    await cli("init")
    await cli("create", "acme")
    await cli("create", "globex", "--tier", "pro")
    (tmp_path / "jobs.py").write_text(FUNCTIONS)
    table = await cli("run", "jobs:plain", "--all", "--arg", "greeting=hi", "--arg", "times:=2")
    assert table.status == 0, table.err
    assert table.out.splitlines()[1:] == ["acme    hi acmehi acme", "globex  hi globexhi globex"]
    found = await cli("run", "jobs:plain", "--tier", "pro", "--args", '{"greeting": "hi"}', "--json")
    assert [(one["tenant"], one["result"]) for one in found.json] == [("globex", "hi globex")]
    partial = await cli("run", "jobs:counted", "--all", "--json", "--concurrency", "2")
    assert partial.status == 1
    assert [one.get("result") for one in partial.json] == [{"n": 1}, None]
    assert partial.json[1]["error"] == "ValueError: not this one"
    assert "jobs.py" in partial.err and "failed for 1 of 2 tenants" in partial.err
    assert [one["result"] for one in (await cli("run", "jobs:left", "--all", "--json")).json] == [1, 0]
    for wrong in (
        ("jobs:plain", "--all"),
        ("jobs:plain", "acme", "--arg", "tenant=x"),
        ("jobs:plain", "acme", "--args", "[1]"),
        ("jobs:plain", "acme", "--args", "{"),
        ("jobs:nothing", "acme"),
        ("jobs:plain", "--arg", "greeting=hi"),
    ):
        assert (await cli("run", *wrong)).status == 1, wrong
    entries = (await cli("audit", "list", "--action", "fleet.run", "--json")).json
    assert {one["detail"]["function"] for one in entries} == {"jobs:plain", "jobs:counted", "jobs:left"}
