"""``tenancy sql``, ``each``, ``run`` and ``url``: every tenant from the shell."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sys
from pathlib import Path

from tests.integration.cli.test_cli import COMMAND, Cli, cli

__all__ = ["cli"]

TYPES = """
SELECT '0b1f4f5e-3f2c-4d7e-9a55-0d6f0f0f0f0f'::uuid AS id, '2026-01-02 03:04:05+02'::timestamptz AS at,
       12.50::numeric AS price, 12345678901234567890.123456789::numeric AS exact, 'NaN'::numeric AS nan,
       7::numeric AS seven, '\\xdead'::bytea AS data, ARRAY[1, NULL, 3] AS list, '{"a": [1, null]}'::jsonb AS doc,
       'null'::jsonb AS jnull, NULL::int AS nothing, '1 day 2 hours 0.5 s'::interval AS span, true AS yes,
       '10.0.0.0/8'::cidr AS net, '[1,5)'::int4range AS range, '2026-01-02'::date AS day, 1 AS twin, 2 AS twin,
       ARRAY['{"b": 1}'::jsonb] AS docs, E'a\\nb' AS lines, '=1+1' AS formula, '-5' AS negative
"""


async def test_one_statement_on_many_tenants(cli: Cli, tmp_path: Path) -> None:
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
