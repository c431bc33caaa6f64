"""``tenancy members``: the people who may act for a tenant, and invitations."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..authentication.credential import Membership
from ..authentication.invitation_rows import Invitation
from ..authentication.member_rows import Member
from ..tenancy import Tenancy
from .output import Column, cell, console, print_json, print_table, printable
from .runtime import ExpiresIn, Json, TenantArgument, duration, operator, run

app = typer.Typer(help="Add, invite, list and remove members of tenants.", no_args_is_help=True)

SubjectArgument = Annotated[str, typer.Argument(help="Who: the subject of their credentials.")]
Roles = Annotated[list[str] | None, typer.Option("--role", help="One of members.roles; repeatable. [default: member]")]

_DEFAULT = ("member",)


def _fields(invitation: Invitation) -> dict[str, Any]:
    fields = {**asdict(invitation), "state": invitation.state}
    if invitation.text is None:
        del fields["text"]
    return fields


@app.command()
def add(tenant: TenantArgument, subject: SubjectArgument, role: Roles = None, as_json: Json = False) -> None:
    """Make a subject a member of a tenant; one who is a member already has these roles from now on."""

    async def command(tenancy: Tenancy) -> Member:
        return await tenancy.members.add(tenant, subject, role or _DEFAULT, actor=operator())

    member = run(command)
    if as_json:
        print_json(member)
    else:
        console.print(f"{printable(subject)} is {_listed(member.roles)} of {tenant}", markup=False, highlight=False)


@app.command()
def remove(tenant: TenantArgument, subject: SubjectArgument, as_json: Json = False) -> None:
    """End a membership, at once in every process."""

    async def command(tenancy: Tenancy) -> bool:
        return await tenancy.members.remove(tenant, subject, actor=operator())

    removed = run(command)
    if as_json:
        print_json({"subject": subject, "removed": removed})
    else:
        what = "is removed from" if removed else "was not a member of"
        console.print(f"{printable(subject)} {what} {tenant}", markup=False, highlight=False)


@app.command("list")
def list_members(tenant: TenantArgument, as_json: Json = False) -> None:
    """List a tenant's members and their roles."""

    async def command(tenancy: Tenancy) -> list[Member]:
        return await tenancy.members.list(tenant)

    found = run(command)
    if as_json:
        print_json(found)
        return
    columns = (Column("subject", keep=True), "roles", Column("since", drop=1))
    print_table(f"members of {tenant}", columns, [(x.subject, sorted(x.roles), x.created_at) for x in found])


@app.command("tenants-of")
def tenants_of(subject: SubjectArgument, as_json: Json = False) -> None:
    """List the tenants that a subject is a member of, and its roles there."""

    async def command(tenancy: Tenancy) -> list[Membership]:
        return await tenancy.members.tenants_of(subject)

    found = run(command)
    rows = [(x.tenant.slug, x.tenant.status.value, sorted(x.roles), x.tenant.id) for x in found]
    names = ("slug", "status", "roles", "id")
    if as_json:
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return
    columns = ("slug", Column("status", keep=True), "roles", Column("id", keep=True))
    print_table(f"tenants of {printable(subject)}", columns, rows)


@app.command()
def invite(
    tenant: TenantArgument,
    role: Roles = None,
    email: Annotated[str | None, typer.Option(help="Whom it is sent to, for people to read in the list.")] = None,
    expires_in: ExpiresIn = None,
    as_json: Json = False,
) -> None:
    """Make an invitation, and print its text. Whoever has the text can accept it, once; it is not shown again."""
    lifetime = duration(expires_in)

    async def command(tenancy: Tenancy) -> Invitation:
        return await tenancy.members.invite(
            tenant, roles=role or _DEFAULT, email=email, expires_in=lifetime, actor=operator()
        )

    made = run(command)
    if as_json:
        print_json(_fields(made))
        return
    until = cell(made.expires_at)
    console.print(f"invitation {made.id} to {tenant}, until {until}, not shown again:", markup=False, highlight=False)
    print(made.text)


@app.command()
def invitations(tenant: TenantArgument, as_json: Json = False) -> None:
    """List a tenant's invitations, without their texts."""

    async def command(tenancy: Tenancy) -> list[Invitation]:
        return await tenancy.members.invitations(tenant)

    found = run(command)
    if as_json:
        print_json([_fields(invitation) for invitation in found])
        return
    rows = [(x.id, x.state, sorted(x.roles), x.email, x.created_at, x.expires_at, x.accepted_by) for x in found]
    columns = (
        Column("id", keep=True),
        Column("state", keep=True),
        "roles",
        Column("email", drop=2),
        Column("created", drop=4),
        Column("expires", drop=3),
        Column("accepted by", drop=1),
    )
    print_table(f"invitations to {tenant}", columns, rows)


@app.command()
def withdraw(
    invitation_id: Annotated[str, typer.Argument(help="The id, as members invitations prints it.")],
    as_json: Json = False,
) -> None:
    """Withdraw an invitation: nobody can accept it any more."""

    async def command(tenancy: Tenancy) -> Invitation:
        return await tenancy.members.withdraw(invitation_id, actor=operator())

    withdrawn = run(command)
    if as_json:
        print_json(_fields(withdrawn))
    else:
        console.print(f"invitation {withdrawn.id} is withdrawn", highlight=False)


def _listed(roles: frozenset[str]) -> str:
    return ", ".join(sorted(roles))
