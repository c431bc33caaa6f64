"""``tenancy audit``, run as a user runs it."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tenancy_orm import TenancyConfig
from tenancy_orm.audit.checkpoints import Signer
from tenancy_orm.audit.log import AuditLog
from tenancy_orm.authentication.refusals import Refusal, RefusalCounter
from tenancy_orm.control.database import ControlDatabase
from tests.support.audit import age
from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment
from tests.support.warm import run_module

Cli = Callable[..., Awaitable[str]]
RETIRED = secrets.token_bytes(32)
CURRENT = secrets.token_bytes(32)


def written(**keys: bytes) -> str:
    """Keys as ``TENANCY_ENCRYPTION_KEYS`` holds them; a name is an underscore and the id."""
    return ",".join(f"{name[1:]}:{base64.b64encode(key).decode()}" for name, key in keys.items())


@pytest.fixture
def cli(postgres: Postgres, name_prefix: str, control_url: str, tmp_path: Path) -> Cli:
    """Run ``tenancy audit`` in a directory of its own; returns what it printed."""
    variables = environment(
        TENANCY_CONTROL_URL=control_url,
        TENANCY_SERVERS=f"default={postgres.admin_url}",
        TENANCY_METADATA="tests.support.models:Base.metadata",
        TENANCY_NAME_PREFIX=name_prefix,
        PYTHONPATH=str(ROOT),
        NO_COLOR="1",
    )

    async def run(*arguments: str, keys: str, status: int = 0) -> str:
        env = {**variables, "TENANCY_ENCRYPTION_KEYS": keys}
        done = await run_module("tenancy_orm.cli", "audit", *arguments, cwd=tmp_path, env=env)
        assert done.status == status, done.out + done.err
        return done.out + done.err

    return run


@pytest.fixture
async def files(tenancy_config: TenancyConfig, tmp_path: Path) -> Path:
    """A log with its first months removed, under a key that is retired; its checkpoints 2 and 4, and the keys."""
    control = ControlDatabase(tenancy_config.control_url, name_prefix=tenancy_config.name_prefix)
    try:
        await control.upgrade()
        await control.open()
        audit = AuditLog(control, Signer({"1": RETIRED}))
        for month in (1, 2):
            await age(control, audit, datetime(2024, month, 15, tzinfo=UTC), 2)
            (tmp_path / f"{month * 2}.json").write_text((await audit.export_checkpoint()).to_json())
        await age(control, audit, datetime(2024, 3, 15, tzinfo=UTC), 1)
        assert await audit.prune(before=datetime(2024, 3, 1, tzinfo=UTC)) is not None
        keys = {**audit.public_keys, **Signer({"2": CURRENT}).public_keys}
        (tmp_path / "keys.json").write_text(json.dumps(keys))
    finally:
        await control.close()
    return tmp_path


async def test_verify_says_which_checkpoints_it_compared(files: Path, cli: Cli) -> None:
    """One that is older than what was kept, or than where it began, is not counted as confirmed."""
    keys = written(_1=RETIRED)
    told = await cli("verify", "--checkpoint", "2.json", "--checkpoint", "4.json", keys=keys)
    assert "1 checkpoints confirmed; not compared, since retention has removed their entries: 2" in told
    report = json.loads(await cli("verify", "--checkpoint", "2.json", "--json", keys=keys))
    assert (report["ok"], report["confirmed"], report["removed"], report["skipped"]) == (True, [], [2], [])
    (files / "last.json").write_text(await cli("checkpoint", keys=keys))
    told = await cli("verify", "--since", "last.json", "--checkpoint", "4.json", keys=keys)
    assert "0 checkpoints confirmed; not compared, since they are before the start: 4" in told


async def test_verify_accepts_what_a_retired_key_signed(files: Path, cli: Cli) -> None:
    """Where both keys were known once; where they never were, with the public keys that were kept."""
    alone = written(_2=CURRENT)
    assert "give a Verifier" in await cli("verify", keys=alone, status=1)
    given = ("--checkpoint", "4.json", "--public-keys", "keys.json")
    assert "1 checkpoints confirmed" in await cli("verify", *given, keys=alone)
    assert json.loads(await cli("public-keys", keys=written(_1=RETIRED, _2=CURRENT))).keys() == {"1", "2"}
    assert "1 checkpoints confirmed" in await cli("verify", "--checkpoint", "4.json", keys=alone)
    assert json.loads(await cli("public-keys", keys=alone)) == json.loads((files / "keys.json").read_text())


async def test_what_was_refused_and_why_is_in_the_table(tenancy_config: TenancyConfig, cli: Cli) -> None:
    """The reason, the tenant that was named, and the count; not only in the JSON."""
    control = ControlDatabase(tenancy_config.control_url, name_prefix=tenancy_config.name_prefix)
    counter = RefusalCounter()
    counter.add(Refusal.rejected("issuer", None, None, (None, None)))
    counter.add(Refusal.cross_tenant_request("globex", "HeaderResolver", "k-1", None, (None, None)), 3)
    try:
        await control.upgrade()
        await control.open()
        audit = AuditLog(control, Signer({"1": CURRENT}))
        for refusal, detail in counter.entries():
            async with control.transaction() as connection:
                await audit.append(connection, action=refusal.action, detail=detail)
    finally:
        await control.close()
    listed = await cli("list", keys=written(_1=CURRENT))
    assert "DETAIL" in listed
    assert "reason=issuer count=1" in listed
    assert "named=globex resolver=HeaderResolver count=3" in listed


async def test_a_file_that_is_no_checkpoint_or_has_no_keys_is_named(files: Path, cli: Cli) -> None:
    """In words, whatever is in it."""
    (files / "binary").write_bytes(b"\xff\xfe\x00")
    (files / "list").write_text("[1]")
    keys = written(_1=RETIRED)
    for arguments, message in (
        (("--checkpoint", "binary"), "not UTF-8"),
        (("--since", "absent"), "cannot be read"),
        (("--checkpoint", "list"), "not a checkpoint"),
        (("--public-keys", "binary"), "not UTF-8"),
        (("--public-keys", "list"), "public keys by id"),
    ):
        told = await cli("verify", *arguments, keys=keys, status=1)
        assert message in " ".join(told.split()) and "Traceback" not in told
