"""Members: which subjects may act for a tenant, and with which roles. Identity providers know people, not tenants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import delete, select

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_while_bound
from ..control.models import members, tenants
from ..events import MemberRemoved
from ..registry.lifecycle import lock_tenant_for_share
from ..registry.rows import TENANT_COLUMNS, tenant_from_row
from ..tenant import Status, Tenant
from .credential import Membership
from .invitations import InvitationManager
from .member_rows import Member, check_roles, check_subject, find_member, member_from_row, put_member, snapshot


class MemberManager(InvitationManager):
    """Adds, removes and lists the members of tenants, and invites others; ``tenancy.members``.

    Every change is audited in the same transaction, under ``actor``, and reaches every process through PostgreSQL's
    NOTIFY. A ``tenant`` is a slug, an id or a ``Tenant``. A ``subject`` is who somebody is in the words of the identity
    provider or of the application: the ``subject`` of their credentials, 1 to 255 printable characters.
    """

    async def add(
        self,
        tenant: str | UUID | Tenant,
        subject: str,
        roles: Sequence[str] = ("member",),
        *,
        actor: Actor = SYSTEM,
    ) -> Member:
        """Make ``subject`` a member with these roles; one who is a member already has these roles from now on.

        Args:
            tenant: Where.
            subject: Who.
            roles: One or more of ``members.roles``.
            actor: Who does this, for the audit log.

        Raises:
            TenantNotFoundError: no such tenant.
            InvalidSubjectError: the subject is malformed.
            UnknownRoleError: a role is not configured.
            ConfigurationError: there is no role.
            ControlUnavailableError: the control database does not answer.
        """
        check_subject(subject)
        wanted = check_roles(roles, self._config)
        owner = await self._directory.tenant(tenant)
        async with self._control.transaction() as connection:
            slug, _ = await lock_tenant_for_share(connection, owner.id)
            before, after = await put_member(connection, owner.id, subject, wanted)
            if before == after:
                return after
            await self._audit.append(
                connection,
                action="member.add" if before is None else "member.change",
                tenant_id=owner.id,
                slug=slug,
                actor=actor,
                before=snapshot(before),
                after=snapshot(after),
            )
        self._directory.invalidate_subject(subject)
        self._announce(slug, before, after)
        return after

    async def remove(self, tenant: str | UUID | Tenant, subject: str, *, actor: Actor = SYSTEM) -> bool:
        """End a membership: every process refuses the subject there from now on, also on what is open.

        Returns whether it was one; removing a subject that is no member changes nothing.

        Raises:
            TenantNotFoundError: no such tenant.
            InvalidSubjectError: the subject is malformed.
        """
        check_subject(subject)
        owner = await self._directory.tenant(tenant)
        async with self._control.transaction() as connection:
            slug, _ = await lock_tenant_for_share(connection, owner.id)
            before = await find_member(connection, owner.id, subject)
            if before is None:
                return False
            of_subject = (members.c.tenant_id == owner.id) & (members.c.subject == subject)
            await connection.execute(delete(members).where(of_subject))
            await self._audit.append(
                connection,
                action="member.remove",
                tenant_id=owner.id,
                slug=slug,
                actor=actor,
                before=snapshot(before),
            )
        self._directory.invalidate_subject(subject)
        self._events.emit(MemberRemoved(tenant_id=owner.id, slug=slug, subject=subject))
        return True

    async def tenants_of(self, subject: str) -> list[Membership]:
        """Return the tenants that ``subject`` is a member of, with its roles there, by slug.

        For operators. Within a request use ``credential.memberships``: the caller's own, and only those that its
        credential allows. Tenants of every status are among them, but none that is purged.

        Raises:
            CrossTenantError: a tenant is bound.
            InvalidSubjectError: the subject is malformed.
        """
        refuse_while_bound("listing the tenants of a subject")
        check_subject(subject)
        query: Any = (
            select(*TENANT_COLUMNS, members.c.roles.label("member_roles"))
            .join(members, members.c.tenant_id == tenants.c.id)
            .where(members.c.subject == subject, tenants.c.status != Status.PURGED)
            .order_by(tenants.c.slug)
        )
        async with self._control.connect() as connection:
            rows = await connection.execute(query)
            return [Membership(tenant_from_row(row), frozenset(row.member_roles)) for row in rows]

    async def list(self, tenant: str | UUID | Tenant) -> list[Member]:
        """Return a tenant's members, the oldest membership first.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        owner = await self._directory.tenant(tenant)
        query = select(members).where(members.c.tenant_id == owner.id).order_by(members.c.created_at, members.c.subject)
        async with self._control.viewing(owner.id) as connection:
            return [member_from_row(row) for row in await connection.execute(query)]


__all__ = ["Member", "MemberManager"]
