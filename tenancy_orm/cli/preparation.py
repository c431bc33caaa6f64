"""What ``tenancy init`` says and asks before it changes the rights of others on the servers."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from ..config import ServerAddresses, TenancyConfig, sources
from ..provisioning.preparation.plan import PreparationPlan
from ..provisioning.rights.public_access import Closing
from ..secrets.keyring import Keyring
from .output import console, print_json
from .runtime import exit_on_error, fail, load_tenancy

LEAVE_PUBLIC = """
[provisioning]
revoke_public = false                 # tenants' roles can connect to postgres, template1 and the control database
"""
"""What a settings file has for ``--leave-public``."""

_EVERYBODY = "all"
_CONNECTED = "connected"


def leave_public(directory: Path) -> bool:
    """Set ``provisioning.revoke_public`` to false for this process; return whether the new settings file must have it.

    Where other processes would not find it, exit with status 1.
    """
    configured = exit_on_error(lambda: sources.read(TenancyConfig, None, {}))
    if "provisioning.revoke_public" in configured.origins:
        if not exit_on_error(lambda: configured.build(TenancyConfig)).provisioning.revoke_public:
            return False
    elif not {"TENANCY_CONFIG", "TENANCY_APP"} & os.environ.keys() and not (directory / "tenancy.toml").exists():
        os.environ["TENANCY_PROVISIONING_REVOKE_PUBLIC"] = "false"
        return True
    return fail(
        "every process must know --leave-public, and nothing was changed: put revoke_public = false under "
        "[provisioning] in tenancy.toml, or set TENANCY_PROVISIONING_REVOKE_PUBLIC=false, and run tenancy init again"
    )


def prepare(
    files: Sequence[str],
    *,
    changes: Sequence[str],
    yes: bool,
    dry_run: bool,
    keep: Collection[str],
    shared: bool,
    as_json: bool,
) -> dict[str, Any] | None:
    """Say what preparing the servers changes, ask where somebody would lose access, and do it.

    That is all that may take something from others: what is left of preparing the servers, opening a ``Tenancy`` does.
    Nothing has changed where this exits with status 1.

    Args:
        files: The files that will be made, for ``--dry-run``.
        changes: What will be changed in files that are there.
        yes: Do not ask.
        dry_run: Only say it.
        keep: The values of ``--keep-access``.
        shared: Accept a control database that another application has tables in.
        as_json: Print JSON, and ask nothing.

    Returns:
        What was changed, as JSON values; None where the server is an embedded one, which nobody else uses.
    """
    config = exit_on_error(load_tenancy).config
    if not config.is_embedded and config.secrets.provider is None and config.secrets.key_wrapper is None:
        exit_on_error(lambda: Keyring(config.sealing_keys))  # as opening would refuse later, when much has changed
    plan = _read_plan(config, shared=shared)
    kept = frozenset[str]() if plan is None else _roles_to_keep(plan, keep)
    described = None if plan is None else _as_dict(plan, kept)
    if dry_run:
        if as_json:
            would = {"would_create": list(files), "would_change": list(changes)}
            print_json({"dry_run": True, **would, "preparation": described})
            return described
        for name in files:
            _line(f"{name} is made")
        for change in changes:
            _line(f"changed: {change}")
        if plan is not None:
            _show(plan, kept)
        else:
            _line("the embedded server is started, and made if it is missing; nobody else uses it")
            _line("its control database is upgraded if it is at an older revision, as at each start")
        _line("nothing was changed (--dry-run)")
    elif plan is not None:
        _carry_out(plan, config, kept, yes=yes, as_json=as_json)
    return described


def prepare_server(
    config: TenancyConfig,
    name: str,
    addresses: ServerAddresses,
    *,
    keep: Collection[str],
    yes: bool,
    as_json: bool,
) -> None:
    """Say what preparing a new server changes, ask where somebody would lose access, and revoke PUBLIC's rights.

    Nothing has changed where this exits with status 1.

    Args:
        config: The configuration in force.
        name: The server's name.
        addresses: Its addresses.
        keep: The values of ``--keep-access``.
        yes: Do not ask.
        as_json: Print nothing but an error, and ask nothing.
    """
    if exit_on_error(load_tenancy).config.is_embedded:
        return  # its control database is stopped by now; the preparation refuses where somebody would lose access
    config = config.replace(servers={name: addresses})

    async def read() -> PreparationPlan:
        return await PreparationPlan.read(config)

    plan = exit_on_error(lambda: asyncio.run(read()))
    if plan.unavailable:
        fail(str(plan.unavailable[0]), kind=type(plan.unavailable[0]).__name__)
    kept = _roles_to_keep(plan, keep)
    _carry_out(plan, config, kept, yes=yes, as_json=as_json)


def _read_plan(config: TenancyConfig, *, shared: bool) -> PreparationPlan | None:
    """Return what preparing the servers will change; None where the server is an embedded one, which is nobody else's.

    Args:
        config: The configuration.
        shared: Accept a control database that another application has tables in.
    """
    if config.is_embedded:
        # before anything is made, which would have to be removed again, and before --dry-run promises it
        exit_on_error(lambda: import_module("tenancy_orm.testing.embedded"))
        return None

    async def read() -> PreparationPlan:
        return await PreparationPlan.read(config)

    plan = exit_on_error(lambda: asyncio.run(read()))
    exit_on_error(lambda: plan.check_control(shared=shared))
    return plan


def _roles_to_keep(plan: PreparationPlan, chosen: Collection[str]) -> frozenset[str]:
    """Return the roles that ``--keep-access`` names: single ones, ``all`` of them, or those ``connected`` now."""
    kept: set[str] = set()
    for name in chosen:
        if name == _EVERYBODY:
            kept |= plan.losing
        elif name == _CONNECTED:
            kept |= plan.connected
        elif plan.losing and name not in plan.losing:
            # a mistyped name would lock out the role that was meant
            fail(f"--keep-access {name}: no such role loses access; those that do: {', '.join(sorted(plan.losing))}")
        else:
            kept.add(name)
    return frozenset(kept)


def _carry_out(
    plan: PreparationPlan, config: TenancyConfig, kept: Collection[str], *, yes: bool, as_json: bool
) -> None:
    """Say what a plan changes, ask where somebody would lose access, and do it."""
    if not as_json:
        _show(plan, kept)
    _confirm(plan, kept, yes=yes, as_json=as_json)
    exit_on_error(lambda: asyncio.run(plan.apply(config, keep=kept)))


def _confirm(plan: PreparationPlan, kept: Collection[str], *, yes: bool, as_json: bool) -> None:
    """Ask, if somebody would lose access. Exit with status 1 where the answer is no, or where nobody can be asked."""
    if yes or plan.losing <= frozenset(kept):
        return
    if as_json or not sys.stdin.isatty():
        if as_json:
            print_json({"created": [], "preparation": _as_dict(plan, kept)})
        fail(
            f"nothing was changed: {', '.join(sorted(plan.losing - frozenset(kept)))} would lose access to databases. "
            "Run it again with --yes to continue, with --keep-access all (or connected, or a role's name) to grant it "
            "to them, or with --leave-public to leave PUBLIC's rights as they are"
        )
    if not typer.confirm("Continue?"):
        fail("nothing was changed")


def _show(plan: PreparationPlan, kept: Collection[str]) -> None:
    """Print the plan for people."""
    if plan.creates_control:
        _line(f"the control database {plan.control_address} does not exist, and is made; PUBLIC gets no rights on it")
    if plan.upgrade is not None:
        _line(f"the control database is upgraded from {plan.upgrade[0]} to {plan.upgrade[1]}")
    for error in plan.unavailable:
        _line(f"{error}; it is not prepared, and the others are")
    for closing in plan.closings:
        _show_closing(closing, kept)
    if plan.losing - frozenset(kept):
        _line("sessions that are open stay open; a role that loses access cannot open another one")
        _line("--keep-access all grants it to all of these, --keep-access connected to those that are connected now")
        _line("--leave-public leaves PUBLIC's rights: tenants' roles can then connect to these databases as well")


def _show_closing(closing: Closing, kept: Collection[str]) -> None:
    place = f"database {closing.database} on server {closing.server}"
    if not closing.may_revoke:
        _line(f"{place}: every role can connect, and the administrator may not change that; run as a superuser:")
        _line(f"    {closing.statement};")
        for role in closing.relying:
            _line(f"    which takes access from {role}; to keep it: {closing.remedy(role)};")
        return
    _line(f"{place}: PUBLIC loses its rights, CONNECT and TEMPORARY")
    for role in closing.losing:
        sessions = [
            f"{session.count} connected now as {session.application_name or 'no application_name'!s}"
            for session in closing.connected
            if session.role == role
        ]
        now = f" ({', '.join(sessions)})" if sessions else ""
        if role in kept:
            _line(f"    {role}{now} keeps its access: it is granted CONNECT and TEMPORARY")
        else:
            _line(f"    {role}{now} loses its access; to keep it: {closing.remedy(role)};")


def _as_dict(plan: PreparationPlan, kept: Collection[str]) -> dict[str, Any]:
    """Return the plan as JSON values."""
    return {
        "control_database": plan.control_address,
        "creates_control_database": plan.creates_control,
        "upgrade": None if plan.upgrade is None else {"from": plan.upgrade[0], "to": plan.upgrade[1]},
        "unavailable": {error.server: str(error) for error in plan.unavailable},
        "databases": [
            {
                "server": closing.server,
                "database": closing.database,
                "statement": closing.statement,
                "may_revoke": closing.may_revoke,
                "relying": list(closing.relying),
                "roles": [
                    {
                        "role": role,
                        "keeps_access": role in kept,
                        "remedy": closing.remedy(role),
                        "connected": [
                            {"application_name": session.application_name, "count": session.count}
                            for session in closing.connected
                            if session.role == role
                        ],
                    }
                    for role in closing.losing
                ],
            }
            for closing in plan.closings
        ],
    }


def _line(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


__all__ = ["LEAVE_PUBLIC", "leave_public", "prepare", "prepare_server"]
