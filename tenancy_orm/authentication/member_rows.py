"""Rows of members as values, and their INSERT and UPDATE."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from ..config import MembersConfig
from ..control.models import members
from ..errors import ConfigurationError, InvalidSubjectError, UnknownRoleError
from .credential import is_name

# of unknown roles in an error
_MAX_NAMED = 10
_ROLE_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Member:
    """A subject that may act for a tenant, with its roles there. ``created_at`` is an aware datetime in UTC."""

    tenant_id: UUID
    subject: str
    roles: frozenset[str]
    created_at: datetime


def check_subject(subject: str, what: str = "a subject") -> str:
    """Return the subject of an identity provider or of the application, or another id of a credential.

    Raises:
        InvalidSubjectError: it is empty, too long, or has characters that cannot be printed.
    """
    if not is_name(subject):
        raise InvalidSubjectError(what)
    return subject


def check_roles(roles: Iterable[str], config: MembersConfig) -> list[str]:
    """Return the roles, sorted and without duplicates.

    Raises:
        UnknownRoleError: one is not configured.
        ConfigurationError: they are one string, or none.
    """
    if isinstance(roles, str):
        raise ConfigurationError("roles must be a sequence of roles, not one string")
    given: list[object] = list(roles)  # of a JSON body, for example
    unknown = [role for role in given if not isinstance(role, str) or role not in config.roles]
    if unknown:
        named = (role if isinstance(role, str) else repr(role) for role in unknown[:_MAX_NAMED])
        raise UnknownRoleError(tuple(name[:_ROLE_LENGTH] for name in named), tuple(config.roles))
    if not given:
        raise ConfigurationError("a member has at least one role; to end a membership, remove the member")
    return sorted({role for role in given if isinstance(role, str)})


async def put_member(
    connection: AsyncConnection, tenant_id: UUID, subject: str, roles: Iterable[str], *, keep: bool = False
) -> tuple[Member | None, Member]:
    """Insert or change a member in the caller's transaction, which has locked the tenant; returns it before and after.

    Args:
        connection: The caller's transaction; it writes the audit entry.
        tenant_id: The tenant.
        subject: Who.
        roles: The roles, checked.
        keep: Whether the roles of one who is a member already are kept as well.
    """
    wanted = sorted(roles)
    values = {"tenant_id": tenant_id, "subject": subject, "roles": wanted}
    statement = insert(members).values(values).on_conflict_do_nothing().returning(members)
    while (row := (await connection.execute(statement)).one_or_none()) is None:
        before = await find_member(connection, tenant_id, subject)
        if before is None:
            continue  # removed in between
        after = sorted(before.roles | set(wanted)) if keep else wanted
        if before.roles == frozenset(after):
            return before, before
        changed = update(members).where(_is(tenant_id, subject)).values(roles=after).returning(members)
        return before, member_from_row((await connection.execute(changed)).one())
    return None, member_from_row(row)


async def find_member(connection: AsyncConnection, tenant_id: UUID, subject: str) -> Member | None:
    """Return a member, locked until the transaction ends, or None."""
    query = select(members).where(_is(tenant_id, subject)).with_for_update()
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else member_from_row(row)


def _is(tenant_id: UUID, subject: str) -> ColumnElement[bool]:
    return (members.c.tenant_id == tenant_id) & (members.c.subject == subject)


def member_from_row(row: Row[*tuple[Any, ...]]) -> Member:
    """Build the value object from a row of the table."""
    return Member(row.tenant_id, row.subject, frozenset(row.roles), row.created_at)


def snapshot(member: Member | None) -> dict[str, Any] | None:
    """Return a member's fields for the audit log."""
    return None if member is None else {"subject": member.subject, "roles": sorted(member.roles)}
