"""A process that takes part in a run and is killed, or stops: ``python -m tests.support.runs_process``.

It reads what to do as JSON from stdin. At the point that is named there, it sends itself a signal.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import ProvisioningConfig
from tenancy_orm.protocols import GrantTarget
from tenancy_orm.provisioning import Provisioner
from tenancy_orm.runs.claims import RunClaims
from tenancy_orm.runs.wave_texts import parse_waves

# by the name of a point: what is wrapped, at which call, and whether the signal comes after it
POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "before the first claim": (RunClaims, "open_wave", 1, False),
    "before the change": (RunClaims, "begin", 2, True),
    "after the change": (Provisioner, "apply_grants", 2, False),
    "before the second wave": (RunClaims, "open_wave", 2, False),
    "after the second wave is open": (RunClaims, "open_wave", 2, True),
    "after the last": (RunClaims, "end", 1, False),
}


def keep_ledger(target: GrantTarget) -> list[str]:
    """A grant hook: a tenant only adds to its ledger."""
    revoke = f"REVOKE UPDATE, DELETE ON ledger FROM {target.role}"
    return [f"DO $$ BEGIN IF to_regclass('public.ledger') IS NOT NULL THEN {revoke}; END IF; END $$"]


def config_of(task: dict[str, Any]) -> TenancyConfig:
    """The application's configuration."""
    return TenancyConfig(
        control_url=task["control_url"],
        servers={"default": task["admin_url"]},
        migrations=task["migrations"],
        encryption_keys={"1": "a2V5" * 10 + "a2U="},
        name_prefix=task["name_prefix"],
        provisioning=ProvisioningConfig(grants=keep_ledger),
    )


def arrange(patch: pytest.MonkeyPatch, point: str, name: str) -> None:
    """Have this process send itself the signal of that name when it comes to the point."""
    owner, method, which, after = POINTS[point]
    original = getattr(owner, method)
    calls = 0

    async def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = await original(*args, **options) if after else None
        if calls == which:
            os.kill(os.getpid(), signal.Signals[name])
        return result if after else await original(*args, **options)

    patch.setattr(owner, method, wrapped)


async def main(task: dict[str, Any]) -> None:
    """Upgrade all tenants, or downgrade them."""
    async with Tenancy(config_of(task)) as tenancy:
        waves = parse_waves(task["waves"]) if "waves" in task else None
        if "down" in task:
            report = await tenancy.migrations.downgrade(task["down"], concurrency=1)
        else:
            report = await tenancy.migrations.upgrade(concurrency=task.get("concurrency", 1), waves=waves)
    print(json.dumps({"ok": report.ok, "run": report.run, "changed": len(report.changed)}))


if __name__ == "__main__":
    given = json.loads(sys.stdin.read())
    with pytest.MonkeyPatch.context() as patching:
        if given.get("at"):
            arrange(patching, given["at"], given["signal"])
        asyncio.run(main(given))
