"""``tenancy members`` and ``tenancy revocations``, run as a user runs them."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.control import control_plane
from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment
from tests.support.warm import Finished, run_module

Cli = Callable[..., Awaitable[Finished]]


@pytest.fixture
async def cli(postgres: Postgres, name_prefix: str, control_url: str, tmp_path: Path) -> Cli:
    """Run ``tenancy`` where there are two tenants, acme and globex, without databases."""
    async with control_plane(control_url, opened=False) as plane:
        for slug in ("acme", "globex"):
            await plane.tenant(slug)
    variables = environment(
        TENANCY_CONTROL_URL=control_url,
        TENANCY_NAME_PREFIX=name_prefix,
        TENANCY_SERVERS=f"default={postgres.admin_url}",
        TENANCY_METADATA="tests.support.models:Base.metadata",
        TENANCY_ENCRYPTION_KEYS="1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
        TENANCY_MEMBERS_ROLES="owner=*;member=",
        PYTHONPATH=str(ROOT),
        COLUMNS="200",
        NO_COLOR="1",
    )

    async def run(*arguments: str, **changes: str) -> Finished:
        return await run_module("tenancy_orm.cli", *arguments, cwd=tmp_path, env={**variables, **changes}, stdin="")

    return run


def read(done: Finished) -> Any:
    """The one JSON document of an output."""
    assert done.status == 0, done.err
    return json.loads(done.out)


async def test_members_by_command(cli: Cli, control_url: str) -> None:
    """Add, list, ask, remove; an operator is the actor, and what a subject has in it controls no terminal."""
    added = await cli("members", "add", "acme", "auth0|5f7c", "--role", "owner", "--role", "member")
    assert (added.status, added.out) == (0, "auth0|5f7c is member, owner of acme\n"), added.err
    for tenant in ("acme", "globex"):
        assert read(await cli("members", "add", tenant, "bob", "--json"))["roles"] == ["member"]
    table = (await cli("members", "list", "acme")).out.splitlines()
    assert [line.split()[0] for line in table] == ["SUBJECT", "auth0|5f7c", "bob"]
    assert [row["roles"] for row in read(await cli("members", "list", "acme", "--json"))] == [
        ["member", "owner"],
        ["member"],
    ]
    tenants = read(await cli("members", "tenants-of", "bob", "--json"))
    assert [(row["slug"], row["status"], row["roles"]) for row in tenants] == [
        ("acme", "active", ["member"]),
        ("globex", "active", ["member"]),
    ]
    assert "acme    active" in (await cli("members", "tenants-of", "bob")).out
    assert (await cli("members", "remove", "acme", "bob")).out == "bob is removed from acme\n"
    assert (await cli("members", "remove", "acme", "bob")).out == "bob was not a member of acme\n"
    assert read(await cli("members", "remove", "globex", "bob", "--json")) == {"subject": "bob", "removed": True}
    for arguments, message in (
        (("add", "acme", "bob", "--role", "boss"), "unknown roles: 'boss'; members.roles has 'owner', 'member'"),
        (("add", "nobody", "bob"), "tenant 'nobody' does not exist"),
        (("add", "acme", "a\x1b[2Jb"), "a subject must be 1 to 255 printable characters"),
    ):
        refused = await cli("members", *arguments)
        assert refused.status == 1 and message in refused.err and "\x1b" not in refused.err
    async with control_plane(control_url, initialise=False, opened=False) as plane:
        entries = await plane.audit.events(action="member.")
        assert len(entries) == 5
        assert {(entry.actor.kind, (entry.actor.id or "")[:4]) for entry in entries} == {("operator", "cli:")}


async def test_invitations_by_command(cli: Cli) -> None:
    """The text is printed once, alone on its line; the list shows what became of it."""
    made = await cli("members", "invite", "acme", "--expires-in", "12h")
    assert made.status == 0, made.err
    headline, text = made.out.splitlines()
    assert headline.startswith("invitation ") and " to acme, until " in headline
    assert text.startswith("invite_") and len(text) == 115
    named = read(await cli("members", "invite", "acme", "--role", "owner", "--email", "bob@example.com", "--json"))
    assert named["text"].startswith("invite_") and (named["roles"], named["state"]) == (["owner"], "pending")
    withdrawn = await cli("members", "withdraw", named["id"])
    assert withdrawn.out == f"invitation {named['id']} is withdrawn\n"
    listed = await cli("members", "invitations", "acme", "--json")
    assert [(row["state"], row["email"]) for row in read(listed)] == [
        ("pending", None),
        ("withdrawn", "bob@example.com"),
    ]
    table = await cli("members", "invitations", "acme")
    for secret in (text, named["text"]):
        assert secret not in listed.out + table.out
    assert named["id"] in table.out
    for arguments, message in (
        (("invite", "acme", "--expires-in", "soon"), "'soon' is not a time: write 90s, 30m, 12h or 7d"),
        (("invite", "acme", "--expires-in", "5000d"), "expires_in must be above 0 and at most 3660 days"),
        (("withdraw", "nonsense"), "invitation 'nonsense' does not exist"),
    ):
        refused = await cli("members", *arguments)
        assert refused.status == 1 and message in refused.err


async def test_revocations_by_command(cli: Cli) -> None:
    """Of a subject and of a token; one of the two has to be given."""
    added = await cli("revocations", "add", "--subject", "auth0|5f7c", "--reason", "laptop lost")
    assert (added.status, added.out) == (0, "subject auth0|5f7c is revoked\n"), added.err
    token = read(await cli("revocations", "add", "--token", "t-1", "--expires-in", "1h", "--json"))
    assert (token["kind"], token["value"]) == ("token", "t-1") and token["expires_at"] is not None
    assert [row["value"] for row in read(await cli("revocations", "list", "--json"))] == ["t-1", "auth0|5f7c"]
    assert "laptop lost" in (await cli("revocations", "list")).out
    assert (await cli("revocations", "remove", "--token", "t-1")).out == "token t-1 is not revoked any more\n"
    assert (await cli("revocations", "remove", "--token", "t-1")).out == "token t-1 was not revoked\n"
    assert read(await cli("revocations", "remove", "--subject", "auth0|5f7c", "--json"))["removed"] is True
    for arguments in (("add",), ("remove",), ("add", "--subject", "a", "--token", "b")):
        refused = await cli("revocations", *arguments)
        assert refused.status == 1 and "give either --subject or --token\n" in refused.err
