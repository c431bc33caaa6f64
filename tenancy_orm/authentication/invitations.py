"""Invitations: a text that makes whoever presents it first a member of a tenant."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import UUID, uuid4

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..config import MembersConfig
from ..context import refuse_other_tenant, refuse_while_bound
from ..control.database import ControlDatabase
from ..control.models import invitations, tenants
from ..errors import (
    ConfigurationError,
    InvalidInvitationError,
    InvitationAcceptedError,
    InvitationNotFoundError,
    TenantDeletedError,
    TenantNotFoundError,
)
from ..events import EventBus, InvitationRefused, MemberAdded, MemberChanged
from ..registry.lifecycle import lock_tenant_for_share
from ..tenant import Status, Tenant, parse_id
from .invitation_rows import Invitation, invitation_from_row, invitation_snapshot
from .invitation_text import InvitationSigner, InvitationText, Signed, parse_invitation
from .member_rows import Member, check_roles, check_subject, find_member, put_member, snapshot
from .refusal_log import RefusalLog
from .refusals import Refusal

if TYPE_CHECKING:
    from .directory import Directory

T = TypeVar("T")

_LONGEST: Final = timedelta(days=3_660)
_KEPT: Final = timedelta(days=30)  # one that has ended; with its email address
_EMAIL_LENGTH: Final = 320
_REFUSING: Final = frozenset({Status.PROVISIONING, Status.SUSPENDED, Status.DELETED, Status.PURGED})


class InvitationManager:
    """Makes, accepts, lists and withdraws invitations; a part of ``tenancy.members``."""

    def __init__(
        self,
        control: ControlDatabase,
        config: MembersConfig,
        directory: Directory,
        audit: AuditLog,
        events: EventBus,
        signer: InvitationSigner,
    ) -> None:
        self._control = control
        self._config = config
        self._directory = directory
        self._audit = audit
        self._events = events
        self._signer = signer
        self._refusals = RefusalLog(control, audit)

    async def close(self) -> None:
        """Write the refusals that are not in the audit log yet."""
        await self._refusals.close()

    async def invite(
        self,
        tenant: str | UUID | Tenant,
        *,
        roles: Sequence[str] = ("member",),
        email: str | None = None,
        expires_in: timedelta | float | None = None,
        actor: Actor = SYSTEM,
    ) -> Invitation:
        """Make an invitation. Its ``text`` is a secret: send it to the person alone, in a link for example.

        Args:
            tenant: Where its bearer becomes a member.
            roles: The roles that its bearer gets.
            email: Whom it is sent to, for people to read in a list. It is not compared with anything, since the subject
                of an identity provider need not be an address: whoever has the text may accept it.
            expires_in: For how long it can be accepted: a timedelta or seconds, at most ten years;
                ``members.invitation_seconds`` where None.
            actor: Who does this, for the audit log.

        Raises:
            TenantNotFoundError, TenantDeletedError: the tenant does not exist, or is deleted.
            UnknownRoleError: a role is not configured.
            ConfigurationError: an argument is malformed.
        """
        owner = await self._directory.tenant(tenant)
        wanted = check_roles(roles, self._config)
        expires_at = datetime.now(UTC) + _check_lifetime(expires_in, self._config.invitation_seconds)
        if email is not None and not (1 <= len(email) <= _EMAIL_LENGTH and email.isprintable()):
            raise ConfigurationError(f"email must be 1 to {_EMAIL_LENGTH} printable characters")
        signed = Signed(uuid4(), owner.id, wanted, expires_at)
        text = self._signer.issue(signed)
        values = {
            "id": signed.id,
            "tenant_id": owner.id,
            "roles": wanted,
            "email": email,
            "digest": text.digest,
            "expires_at": expires_at,
        }
        async with self._control.transaction() as connection:
            slug, status = await lock_tenant_for_share(connection, owner.id)
            if status is Status.DELETED:
                raise TenantDeletedError(slug)
            row = (await connection.execute(insert(invitations).values(values).returning(invitations))).one()
            made = invitation_from_row(row, text=str(text))
            await self._audit.append(
                connection,
                action="invitation.create",
                tenant_id=owner.id,
                slug=slug,
                actor=actor,
                after=invitation_snapshot(made),
            )
        return made

    async def accept(self, text: str, subject: str, *, actor: Actor | None = None) -> Member:
        """Make ``subject`` a member, once. A member keeps the roles that it has, and gets those of the invitation.

        For thirty days the same subject may accept it again while it is a member, which changes nothing: the answer to
        the first time may have been lost.

        Args:
            text: The text of the invitation.
            subject: Who accepts it: the ``subject`` of a credential that was verified. Never take it from the request.
            actor: Who does this, for the audit log; the subject where None.

        Raises:
            InvalidInvitationError: it is unknown, forged, expired, withdrawn or accepted, or the tenant is suspended or
                deleted: the caller gets one answer.
            InvalidSubjectError: the subject is malformed.
            CrossTenantError: another tenant than the invitation's is bound.
        """
        check_subject(subject)
        acting = actor or Actor("session", subject)
        return await self._presented(text, lambda parsed: self._accept(parsed, subject, acting), acting, subject)

    async def get_invitation(self, text: str) -> Invitation:
        """Return the invitation that a text is for, to be shown to its bearer; it is not accepted by that.

        Raises:
            InvalidInvitationError: it could not be accepted now, as ``accept``.
            CrossTenantError: another tenant than the invitation's is bound.
        """
        return await self._presented(text, self._get, Actor("anonymous"))

    async def _presented(
        self, text: str, use: Callable[[InvitationText], Awaitable[T]], actor: Actor, subject: str | None = None
    ) -> T:
        """Call ``use`` with what was read from ``text``; reports and records why it is refused, if it is."""
        parsed = parse_invitation(text)
        refusal = _Refused("malformed")
        while parsed is not None:
            tried = self._signer.keys.ids
            try:
                return await use(parsed)
            except _Refused as refused:
                refusal = refused
            # one that is not forged may be signed by a key that another process has made; read with no row locked
            if refusal.reason != "signature" or not await self._signer.keys.has_any_besides(tried):
                break
        # outside of the handler: the reason must not reach whoever prints the error with its context
        tenant_id, slug = refusal.owner
        self._events.emit(
            InvitationRefused(
                reason=refusal.reason, subject=subject, tenant_id=tenant_id, slug=slug, invitation_id=refusal.id
            )
        )
        self._refusals.add(
            Refusal(
                "invitation.refuse", actor.id or subject, actor.source, refusal.reason, tenant_id, slug, kind=actor.kind
            )
        )
        raise InvalidInvitationError(refusal.reason)

    async def _get(self, text: InvitationText) -> Invitation:
        async with self._control.connect() as connection:
            query = (
                select(tenants.c.slug, tenants.c.status)
                .join(invitations, invitations.c.tenant_id == tenants.c.id)
                .where(invitations.c.id == text.id)
            )
            owner = (await connection.execute(query)).one_or_none()
            row = await self._genuine(connection, text)
        refuse_other_tenant(row.tenant_id)
        if owner is None:
            raise _Refused("unknown")
        _refuse_ended(row, owner.slug, Status(owner.status))
        return invitation_from_row(row)

    async def _accept(self, text: InvitationText, subject: str, actor: Actor) -> Member:
        async with self._control.transaction() as connection:
            tenant_id = await connection.scalar(select(invitations.c.tenant_id).where(invitations.c.id == text.id))
            if tenant_id is None:
                raise _Refused("unknown")
            # the tenant first, as purge does: no member may survive a purge that runs at the same time
            try:
                slug, status = await lock_tenant_for_share(connection, tenant_id)
            except TenantNotFoundError:
                raise _Refused("unknown") from None
            row = await self._genuine(connection, text, lock=True)
            refuse_other_tenant(row.tenant_id)
            found = invitation_from_row(row)
            if found.accepted_by == subject:
                again = await find_member(connection, found.tenant_id, subject)
                if again is not None:
                    return again
            _refuse_ended(row, slug, status)
            accepted = {"accepted_at": func.now(), "accepted_by": subject}
            await connection.execute(update(invitations).where(invitations.c.id == found.id).values(accepted))
            before, after = await put_member(connection, found.tenant_id, subject, found.roles, keep=True)
            await self._audit.append(
                connection,
                action="invitation.accept",
                tenant_id=found.tenant_id,
                slug=slug,
                actor=actor,
                before=snapshot(before),
                after=snapshot(after),
                detail={"invitation_id": str(found.id)},
            )
        self._directory.invalidate_subject(subject)
        self._announce(slug, before, after, found.id)
        return after

    async def _genuine(
        self, connection: AsyncConnection, text: InvitationText, *, lock: bool = False
    ) -> Row[*tuple[Any, ...]]:
        """Return the row of a text, and refuse a text that was not issued for exactly this row."""
        has_expired = (invitations.c.expires_at <= func.now()).label("has_expired")
        query = select(invitations, has_expired).where(invitations.c.id == text.id)
        row = (await connection.execute(query.with_for_update() if lock else query)).one_or_none()
        if row is None:
            raise _Refused("unknown")
        if row.digest != text.digest:
            raise _Refused("secret")
        if not self._signer.verify(text, Signed(row.id, row.tenant_id, row.roles, row.expires_at)):
            # the secret is right: the row was edited, or the key that signed it is not configured any more
            raise _Refused("signature", id=row.id)
        return row

    def _announce(self, slug: str, before: Member | None, after: Member, invitation_id: UUID | None = None) -> None:
        """Emit what a change of a member is, if it is one."""
        tenant_id, subject, roles = after.tenant_id, after.subject, tuple(sorted(after.roles))
        if before is None:
            self._events.emit(
                MemberAdded(tenant_id=tenant_id, slug=slug, subject=subject, roles=roles, invitation_id=invitation_id)
            )
        elif before != after:
            self._events.emit(
                MemberChanged(
                    tenant_id=tenant_id,
                    slug=slug,
                    subject=subject,
                    roles=roles,
                    before=tuple(sorted(before.roles)),
                    invitation_id=invitation_id,
                )
            )

    async def withdraw(self, invitation_id: UUID | str, *, actor: Actor = SYSTEM) -> Invitation:
        """Withdraw an invitation: nobody can accept it any more. Withdrawing a withdrawn one changes nothing.

        Raises:
            InvitationNotFoundError: no such invitation.
            InvitationAcceptedError: it was accepted: remove the member instead.
            CrossTenantError: it is another tenant's than the bound one.
        """
        wanted = _check_id(invitation_id)
        query = (
            select(invitations, tenants.c.slug)
            .join(tenants, tenants.c.id == invitations.c.tenant_id)
            .where(invitations.c.id == wanted)
            .with_for_update(of=invitations)
        )
        async with self._control.transaction() as connection:
            row = (await connection.execute(query)).one_or_none()
            if row is None:
                raise InvitationNotFoundError(wanted)
            refuse_other_tenant(row.tenant_id)
            if row.accepted_by is not None:
                raise InvitationAcceptedError(wanted, subject=row.accepted_by)
            if row.withdrawn_at is not None:
                return invitation_from_row(row)
            statement = update(invitations).where(invitations.c.id == wanted).values(withdrawn_at=func.now())
            withdrawn = invitation_from_row((await connection.execute(statement.returning(invitations))).one())
            await self._audit.append(
                connection,
                action="invitation.withdraw",
                tenant_id=withdrawn.tenant_id,
                slug=row.slug,
                actor=actor,
                before=invitation_snapshot(withdrawn),
            )
        return withdrawn

    async def invitations(self, tenant: str | UUID | Tenant) -> list[Invitation]:
        """Return a tenant's invitations, oldest first, without their texts.

        Those that were accepted or withdrawn, or have expired, are among them for thirty days after their end.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        owner = await self._directory.tenant(tenant)
        query = (
            select(*(column for column in invitations.c if column.name != "digest"))
            .where(invitations.c.tenant_id == owner.id)
            .order_by(invitations.c.created_at, invitations.c.id)
        )
        async with self._control.viewing(owner.id) as connection:
            return [invitation_from_row(row) for row in await connection.execute(query)]

    async def prune_invitations(self) -> int:
        """Remove the invitations of all tenants that ended thirty days ago, and return how many; for housekeeping.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("pruning invitations")
        async with self._control.transaction() as connection:
            row = invitations.c
            # of those that are set
            ended_at = func.least(row.expires_at, row.accepted_at, row.withdrawn_at)
            return (await connection.execute(delete(invitations).where(ended_at < func.now() - _KEPT))).rowcount


class _Refused(Exception):  # noqa: N818 - it never leaves this module
    """Why an invitation is refused."""

    def __init__(
        self,
        reason: str,
        owner: tuple[UUID, str] | tuple[None, None] = (None, None),
        id: UUID | None = None,  # noqa: A002 - as the row's
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.owner = owner
        self.id = id


def _refuse_ended(row: Row[*tuple[Any, ...]], slug: str, status: Status) -> None:
    """Refuse an invitation that is genuine and can no longer be accepted, or not now."""
    if row.accepted_at is not None:
        reason = "accepted"
    elif row.withdrawn_at is not None:
        reason = "withdrawn"
    elif status in _REFUSING:
        reason = f"tenant {status}"
    elif row.has_expired:
        reason = "expired"
    else:
        return
    raise _Refused(reason, (row.tenant_id, slug), row.id)


def _check_id(invitation_id: UUID | str) -> UUID:
    found = parse_id(invitation_id) if isinstance(invitation_id, str) else invitation_id
    if not isinstance(found, UUID):
        raise InvitationNotFoundError(str(invitation_id)[:64])
    return found


def _check_lifetime(expires_in: timedelta | float | None, default: float) -> timedelta:
    given = default if expires_in is None else expires_in
    try:
        lifetime = given if isinstance(given, timedelta) else timedelta(seconds=given)
    except (OverflowError, ValueError):  # infinite, too large, not a number
        lifetime = timedelta(0)
    if not timedelta(0) < lifetime <= _LONGEST:
        raise ConfigurationError(f"expires_in must be above 0 and at most {_LONGEST.days} days")
    return lifetime
