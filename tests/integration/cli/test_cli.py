"""The command line, run as a user runs it: in processes of its own, with settings from the environment."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment, python_path
from tests.support.warm import Finished, run_module


class Outcome(Finished):
    """What a command left behind."""

    @property
    def json(self) -> Any:
        """Its output as one JSON document."""
        return json.loads(self.out)


Cli = Callable[..., Awaitable[Outcome]]

# a process of its own from the start, for what depends on that
COMMAND = ("-m", "tenancy_orm.cli")


@pytest.fixture
def cli(postgres: Postgres, name_prefix: str, empty_url: str, tmp_path: Path) -> Cli:
    """Run ``tenancy`` with the given arguments in an empty directory; a forked one, unless a ``program`` is named."""
    variables = environment(
        TENANCY_CONTROL_URL=empty_url,
        TENANCY_SERVERS=f"default={postgres.admin_url}",
        TENANCY_ENCRYPTION_KEYS="1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
        TENANCY_NAME_PREFIX=name_prefix,
        PYTHONPATH=python_path(ROOT),
        COLUMNS="200",
        NO_COLOR="1",
    )

    async def run(
        *arguments: str,
        stdin: str | None = None,
        program: tuple[str, ...] = (),
        **changes: str,
    ) -> Outcome:
        if not program:
            done = await run_module(
                "tenancy_orm.cli", *arguments, cwd=tmp_path, env={**variables, **changes}, stdin=stdin or ""
            )
            return Outcome(done.status, done.out, done.err)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *program,
            *arguments,
            cwd=tmp_path,
            env={**variables, **changes},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(90):
            out, err = await process.communicate((stdin or "").encode())
        assert process.returncode is not None
        return Outcome(process.returncode, out.decode(), err.decode())

    return run


async def test_a_tenants_life_by_command(cli: Cli, tmp_path: Path) -> None:
    """Set up, create, look, change, suspend, delete, restore and purge, each with an exit status of 0."""
    made = await cli("init", "--json")
    assert made.status == 0, made.err
    assert made.json["created"] == ["tenancy.toml", "migrations", "alembic.ini"]
    assert (tmp_path / "migrations" / "env.py").exists()
    again = await cli("init", "--json")
    assert again.json["created"] == []

    created = await cli("create", "acme", "--tier", "pro", "--metadata", '{"plan": 1}', "--json")
    assert created.status == 0, created.err
    assert created.json["slug"] == "acme"
    assert created.json["metadata"] == {"plan": 1}
    assert created.json["api_key"].startswith("ten_live_")

    listed = await cli("list", "--tier", "pro", "--json")
    assert [item["slug"] for item in listed.json["items"]] == ["acme"]
    assert created.json["api_key"] not in listed.out
    assert (await cli("show", "acme", "--json")).json["id"] == created.json["id"]
    assert (await cli("update", "acme", "--tier", "enterprise", "--json")).json["tier"] == "enterprise"
    assert (await cli("suspend", "acme", "-r", "unpaid", "--json")).json["status"] == "suspended"
    assert (await cli("activate", "acme", "--json")).json["status"] == "active"
    assert (await cli("rename", "acme", "acme-corp", "--json")).json["slug"] == "acme-corp"
    assert (await cli("delete", "acme-corp", "--json")).json["status"] == "deleted"
    assert (await cli("restore", "acme-corp", "--json")).json["status"] == "active"
    await cli("delete", "acme-corp")
    unanswered = await cli("purge", "acme-corp", stdin="")
    assert (unanswered.status, "give it with --yes" in unanswered.err) == (1, True)
    declined = await cli("purge", "acme-corp", stdin="n\n")
    assert declined.status == 1
    assert (await cli("purge", "acme-corp", "--yes", "--json")).json["status"] == "purged"
    assert (await cli("list", "--json")).json["items"] == []
    assert (await cli("reconcile", "--json")).json["errors"] == []
    for name in ("housekeeping", "run-maintenance"):
        assert (await cli(name, "--json")).json["errors"] == []


async def test_people_get_tables(cli: Cli) -> None:
    """Without --json the output is for reading; the key is on a line of its own."""
    await cli("init")
    created = await cli("create", "acme")
    key = created.out.strip().splitlines()[-1]
    assert key.startswith("ten_live_")
    shown = await cli("list")
    assert "acme" in shown.out and "active" in shown.out and shown.err == "1 tenant\n"
    status = await cli("migrate", "status")
    assert status.status == 0, status.out + status.err
    assert status.out.splitlines()[0].split() == ["REVISION", "TENANTS", "AT", "HEAD"]
    assert "acme" not in status.out and "acme" in (await cli("migrate", "status", "--all")).out


async def test_tenants_are_found_by_command(cli: Cli) -> None:
    """By metadata and by a part of the slug, page by page, with how many there are; metadata is merged."""
    await cli("init")
    created = await cli("create", "acme", "--metadata", "customer=cus_1", "--metadata", "seats:=3", "--json")
    assert created.json["metadata"] == {"customer": "cus_1", "seats": 3}
    await cli("create", "globex", "--metadata", '{"customer": "cus_2"}', "--metadata", "seats:=3")

    async def slugs(*filters: str) -> list[str]:
        return [item["slug"] for item in (await cli("list", "--json", *filters)).json["items"]]

    assert await slugs("--metadata", "customer=cus_1") == ["acme"]
    assert await slugs("--metadata", "seats:=3", "--metadata", "customer=cus_2") == ["globex"]
    assert await slugs("--metadata", "seats=3") == []
    assert await slugs("--slug", "*me") == ["acme"]
    assert (await cli("list", "--count", "--metadata", "seats:=3")).out == "2\n"
    first = await cli("list", "--limit", "1", "--json")
    assert (first.json["count"], first.json["next"]) == (2, created.json["id"])
    assert (await cli("list", "--limit", "1")).err == f"1 of 2 tenants; next: --after {created.json['id']}\n"
    merged = await cli("update", "acme", "--set", "plan=pro", "--set", "x:=null", "--unset", "seats", "--json")
    assert merged.json["metadata"] == {"customer": "cus_1", "plan": "pro"}
    assert (await cli("update", "acme", "--metadata", "a=", "--json")).json["metadata"] == {"a": ""}


async def test_an_extension_that_is_configured_later_reaches_tenants_by_command(cli: Cli) -> None:
    """`migrate status --verify` says who lacks it, and its exit status, until `migrate extensions` or an upgrade."""
    await cli("init")
    await cli("create", "acme")
    later = {"TENANCY_EXTENSIONS": "vector"}
    lacking = await cli("migrate", "status", "--verify", **later)
    assert lacking.status == 1
    assert "LACKS EXTENSIONS" in lacking.out and "vector" in lacking.out
    installed = await cli("migrate", "extensions", "--json", **later)
    assert installed.status == 0, installed.err
    assert [(one["slug"], one["extensions"]) for one in installed.json["outcomes"]] == [("acme", ["vector"])]
    shown = await cli("migrate", "status", "--verify", "--json", **later)
    assert shown.status == 0
    assert [one["missing_extensions"] for one in shown.json] == [[]]
    unknown = await cli("migrate", "upgrade", TENANCY_EXTENSIONS="vector,no-such")
    assert unknown.status == 1
    assert "server 'default' does not have the extension 'no-such'" in unknown.err


async def test_the_warm_pool_by_command(cli: Cli) -> None:
    """Fill it, claim from it, show it, and drop it."""
    await cli("init")
    pool = {"TENANCY_PROVISIONING_WARM_POOL": "2"}
    filled = (await cli("warm-pool", "refill", "--json", **pool)).json
    assert len(filled["made"]) == 2 and filled["errors"] == []
    await cli("create", "acme", **pool)
    assert filled["made"][0] in (await cli("sql", "SELECT current_database()", "--tenant", "acme", "--json")).out
    (shown,) = (await cli("warm-pool", "show", "--json", **pool)).json
    assert (shown["ready"], shown["target"]) == (1, 2)
    assert "INCOMPLETE" in (await cli("warm-pool", "show")).out
    assert "made 0, dropped 1" in (await cli("warm-pool", "drain")).out
    assert (await cli("warm-pool", "refill", "--server", "elsewhere")).status == 1


async def test_templates_by_command(cli: Cli) -> None:
    """List, rebuild and prune; the former one is in use, since its process may still run."""
    await cli("init")
    await cli("create", "acme")
    (first,) = (await cli("template", "list", "--json")).json
    assert (first["state"], first["revision"], first["server"]) == ("current", None, "default")
    (built,) = (await cli("template", "rebuild", "--json")).json
    assert built["name"] != first["name"]
    shown = await cli("template", "list")
    assert shown.status == 0
    for text in (first["name"], built["name"], "current", "in use"):
        assert text in shown.out
    planned = await cli("template", "prune", "--older-than", "0", "--dry-run", "--json")
    assert planned.json == {"dry_run": True, "removed": [], "errors": []}
    assert "no template is due" in (await cli("template", "prune")).out
    unknown = await cli("template", "list", "--server", "elsewhere")
    assert unknown.status == 1
    assert "elsewhere" in unknown.err


async def test_keys_by_command(cli: Cli) -> None:
    """Issue, list, rotate and revoke."""
    await cli("init")
    await cli("create", "acme")
    issued = await cli("keys", "issue", "acme", "--name", "ci", "--scope", "read", "--json")
    assert issued.status == 0, issued.err
    rotated = await cli("keys", "rotate", issued.json["key_id"], "--overlap", "60", "--json")
    assert rotated.json["key_id"] != issued.json["key_id"]
    revoked = await cli("keys", "revoke", rotated.json["key_id"], "--json")
    assert revoked.json["revoked"] is True
    listed = await cli("keys", "list", "acme", "--json")
    assert issued.json["key_id"] in listed.out
    assert issued.json["api_key"] not in listed.out


async def test_psql_opens_the_tenants_database_as_its_role(cli: Cli, postgres: Postgres) -> None:
    """Without a password being typed; what is after -- reaches psql."""
    await cli("init")
    created = await cli("create", "acme", "--json")
    path = f"{postgres.bin_dir}:/usr/bin:/bin" if postgres.bin_dir else environment()["PATH"]
    outcome = await cli("psql", "acme", "--", "-Atc", "SELECT current_user || ' ' || current_database()", PATH=path)
    assert outcome.status == 0, outcome.err
    name = created.json["database"]
    assert outcome.out.strip() == f"{name} {name}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nobody"), "tenant 'nobody' does not exist"),
        (("create", "No Slug"), "must be 1 to 63 of a-z"),
        (("create", "acme", "--metadata", "{"), "--metadata is not JSON"),
        (("create", "acme", "--metadata", "plan"), "is not NAME=TEXT, NAME:=JSON or a JSON object"),
        (("update", "acme", "--set", "plan:=pro"), "--set is not JSON"),
        (("update", "acme", "--set", "plan=pro", "--unset", "plan"), "'plan' is given to --set and to --unset"),
        (("update", "acme", "--metadata", "a=b", "--set", "c=d"), "give --metadata, which replaces all of it"),
        (("list", "--slug", "AC*"), "slug 'AC*' must be of a-z"),
        (("create", "acme", "--tier", "gold"), "known tiers"),
        (("keys", "revoke", "nonsense"), "does not exist"),
    ],
)
async def test_an_error_is_one_line_and_exit_status_1(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    """On standard error, without a traceback."""
    await cli("init")
    outcome = await cli(*arguments)
    assert outcome.status == 1
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


async def test_without_a_control_database_the_remedy_is_named(cli: Cli) -> None:
    """The first mistake anybody makes."""
    outcome = await cli("list", program=COMMAND)
    assert outcome.status == 1
    assert "tenancy init" in outcome.err


async def test_a_server_that_is_away_is_an_error_without_credentials(cli: Cli) -> None:
    """No password of a URL is printed."""
    outcome = await cli("list", program=COMMAND, TENANCY_CONTROL_URL="postgresql://admin:hunter2@127.0.0.1:1/control")
    assert outcome.status == 1
    assert "not available" in outcome.err
    assert "hunter2" not in outcome.err + outcome.out


async def test_secret_makes_a_key_that_the_configuration_takes(cli: Cli) -> None:
    """32 bytes under an id."""
    outcome = await cli("secret", program=COMMAND)
    key_id, _, value = outcome.out.strip().partition(":")
    assert key_id == "2", "1 is configured"
    assert len(base64.b64decode(value)) == 32
    first = (await cli("secret", "--json", TENANCY_ENCRYPTION_KEYS="")).json["encryption_key"]
    assert first.startswith("1:")
    listed = await cli("config", "show", "--json", TENANCY_ENCRYPTION_KEYS=f"{first},{outcome.out.strip()}")
    assert listed.status == 0, listed.err
    assert (await cli("secret", TENANCY_ENCRYPTION_KEYS=f"{first},{outcome.out.strip()}")).out.startswith("3:")


async def test_errors_are_json_after_json(cli: Cli) -> None:
    """For programs: the class and the message."""
    await cli("init")
    outcome = await cli("show", "nobody", "--json")
    assert (outcome.status, outcome.out) == (1, "")
    problem = json.loads(outcome.err)
    assert problem["error"] == "TenantNotFoundError" and "'nobody' does not exist" in problem["message"]


async def test_every_command_has_help(cli: Cli) -> None:
    """And the version is the installed one's."""
    root = await cli("--help", program=COMMAND)
    for command in ("init", "create", "list", "show", "update", "suspend", "activate", "delete", "restore", "purge"):
        assert command in root.out
    for command in ("keys", "migrate", "reconcile", "dev", "psql"):
        assert (await cli(command, "--help")).status == 0
    assert (await cli("--version")).out.startswith("tenancy-orm ")


async def test_quotas_and_audit_by_command(cli: Cli, tmp_path: Path) -> None:
    """Set a limit, see it, see who set it, and verify the log against a checkpoint."""
    await cli("init")
    await cli("create", "acme")
    changed = await cli("quotas", "set", "acme", "users=7", "--json")
    assert changed.status == 0, changed.err
    assert {x["resource"]: x["limit"] for x in (await cli("quotas", "usage", "acme", "--json")).json}["users"] == 7
    assert (await cli("quotas", "set", "acme", "users")).status == 1
    assert (await cli("quotas", "set", "acme", "users=7/fortnight")).status == 1
    several = await cli("quotas", "set", "acme", "users=unlimited", "exports=5/day", "api_calls=", "--json")
    limits = {x["resource"]: (x["limit"], x["period"]) for x in several.json}
    assert limits["users"] == (None, "lifetime") and limits["exports"] == (5, "day")
    (tmp_path / "checkpoint.json").write_text((await cli("audit", "checkpoint")).out)
    listed = await cli("audit", "list", "--tenant", "acme", "--json")
    assert listed.json[0]["action"] == "quota.set"
    tiers = (await cli("tiers", "list", "--json")).json
    assert (tiers["differing"], tiers["weights"]["pro"]) == ([], 4)
    assert (await cli("tiers", "apply", "--json")).json["changed"] == []
    assert listed.json[0]["actor"]["id"].startswith("cli:")
    verified = await cli("audit", "verify", "--checkpoint", "checkpoint.json", "--json")
    assert verified.status == 0, verified.out + verified.err
    assert verified.json["ok"] is True
    assert "quota.set" in (await cli("audit", "list")).out


async def test_schedules_trials_and_domains_by_command(cli: Cli) -> None:
    """A trial that ended and a suspension that is due are done by housekeeping; a domain is claimed and released."""
    await cli("init")
    assert (await cli("create", "tried", "--trial-days", "0", "--json")).json["status"] == "trial"
    for slug in ("due", "spared"):
        await cli("create", slug)
        scheduled = await cli("schedule", "suspension", slug, "2020-01-01T00:00+00:00", "-r", "unpaid", "--json")
        assert scheduled.json == {"slug": slug, "suspend_at": "2020-01-01T00:00:00+00:00"}, scheduled.err
    assert (await cli("schedule", "suspension", "spared", "never", "--json")).json["suspend_at"] is None
    report = (await cli("housekeeping", "--json")).json
    assert sorted(report["suspended"]) == ["due", "tried"]
    assert (await cli("start-trial", "tried", "--days", "3", "--json")).json["status"] == "trial"
    prolonged = (await cli("update", "tried", "--trial-days", "9", "--json")).json["trial_ends_at"]
    assert (await cli("maintain", "tried", "--json")).json["status"] == "maintenance"
    ended = (await cli("end-maintenance", "tried", "--json")).json
    assert (ended["status"], ended["trial_ends_at"]) == ("trial", prolonged)
    await cli("delete", "due")
    assert (await cli("schedule", "purge", "due", "2020-01-01T00:00+00:00")).status == 0
    assert (await cli("housekeeping", "--json")).json["purged"] == ["due"]
    assert (await cli("create", "never", "--trial-days", "-1")).status == 2
    for text, message in (("2020-01-01", "offset"), ("soon", "not a time")):
        refused = await cli("schedule", "suspension", "spared", text)
        assert (refused.status, message in refused.err) == (1, True)
    claimed = await cli("domains", "claim", "spared", "app.example.com")
    assert claimed.out.splitlines()[-1].startswith("_tenancy-challenge.app.example.com. IN TXT ")
    assert (await cli("domains", "verify", "spared", "other.example.com")).status == 1
    [listed] = (await cli("domains", "list", "spared", "--json")).json
    assert (listed["domain"], listed["verified_at"]) == ("app.example.com", None)
    assert (await cli("domains", "release", "spared", "app.example.com")).status == 0
    assert (await cli("domains", "list", "spared", "--json")).json == []


async def test_usage_by_command(cli: Cli, tmp_path: Path) -> None:
    """Tenants near a limit; records given up are listed, retried, and sent once the receiver accepts them."""
    (tmp_path / "billing.py").write_text(
        "import pathlib\n"
        "from tenancy_orm.errors import UsageExportError\n"
        "class Sender:\n"
        "    async def send(self, record):\n"
        "        if not pathlib.Path('open').exists():\n"
        "            raise UsageExportError('closed', permanent=True)\n"
        "        return True\n"
        "sender = Sender()\n"
        "async def use():\n"
        "    from datetime import UTC, datetime, timedelta\n"
        "    from tenancy_orm import Tenancy\n"
        "    async with Tenancy() as tenancy:\n"
        "        await tenancy.quotas.consume('acme', 'users', 3)\n"
        "        await tenancy.quotas.consume('acme', 'api_calls', 5, at=datetime.now(UTC) - timedelta(days=2))\n"
    )
    await cli("init")
    await cli("create", "acme")
    sender = {"TENANCY_METERING_USAGE_SENDER": "billing:sender"}
    assert (await cli("usage", "export")).status == 1
    used = await cli(program=("-c", "import asyncio, billing; asyncio.run(billing.use())"))
    assert used.status == 0, used.err
    [near] = (await cli("quotas", "at-risk", "--json")).json
    assert (near["slug"], near["usage"]["resource"], near["fraction"]) == ("acme", "users", 1.0)
    assert "users" in (await cli("quotas", "at-risk", "--fraction", "1")).out
    failed = await cli("usage", "export", "--json", **sender)
    assert (failed.status, failed.json["failed"]) == (1, 1), failed.err
    [given_up] = (await cli("usage", "failures", "--json", **sender)).json
    assert (given_up["slug"], given_up["quantity"], given_up["error"]) == ("acme", 5, "closed")
    (tmp_path / "open").touch()
    assert (await cli("usage", "retry", str(given_up["id"]), "--json", **sender)).json == {"due": 1}
    sent = await cli("usage", "export", "--json", **sender)
    assert (sent.status, sent.json["sent"]) == (0, 1)


async def test_a_settings_file_elsewhere_brings_its_application_along(cli: Cli, tmp_path: Path) -> None:
    """What it names by module:attribute is beside it, as a timer's working directory is not."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "models.py").write_text("from sqlalchemy import MetaData\nmetadata = MetaData()\n")
    (project / "tenancy.toml").write_text('metadata = "models:metadata"\n')
    assert (await cli("--config", "project/tenancy.toml", "init", "--json", program=COMMAND)).status == 0
    listed = await cli("--config", str(project / "tenancy.toml"), "list", "--json", program=COMMAND)
    assert (listed.status, listed.json["items"]) == (0, []), listed.err
