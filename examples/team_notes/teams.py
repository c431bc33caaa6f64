"""Teams, which are tenants: the switcher, members, invitations, and keys for their programs."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tenancy_orm import current_tenant
from tenancy_orm.asgi import demand_scopes, require_scope
from tenancy_orm.errors import InvalidSlugError, TenantExistsError

from .login import people_of, tenancy_of
from .requests import actor_of, person_of, read_fields
from .settings import ROLES

# --- without a tenant: whoever is logged in ---------------------------------------------------------------------------


async def my_teams(request: Request) -> Response:
    """The tenant switcher: the middleware has looked up what the credential allows."""
    person = person_of(request)
    return JSONResponse(
        [
            {"slug": one.tenant.slug, "roles": sorted(one.roles), "url": f"/t/{one.tenant.slug}/notes"}
            for one in person.memberships
        ]
    )


async def create_team(request: Request) -> Response:
    """Create a tenant, with the person as its owner."""
    person = person_of(request)
    slug = (await read_fields(request, "slug"))["slug"]
    tenancy = tenancy_of(request)
    try:
        created = await tenancy.tenants.create(slug, actor=actor_of(request))
    except (InvalidSlugError, TenantExistsError) as error:
        raise HTTPException(422, str(error)) from None
    await tenancy.members.add(created.tenant, person.subject, ["owner"], actor=actor_of(request))
    return JSONResponse({"slug": slug}, 201)


async def accept(request: Request) -> Response:
    """Make the person a member: who it is comes from the credential, never from the body."""
    person = person_of(request)
    text = (await read_fields(request, "invitation"))["invitation"]
    tenancy = tenancy_of(request)
    # one that is not valid raises InvalidInvitationError, which the middleware answers by 403
    member = await tenancy.members.accept(text, person.subject, actor=actor_of(request))
    team = await tenancy.tenants.get(member.tenant_id)
    return JSONResponse({"slug": team.slug, "roles": sorted(member.roles)})


# --- of one team ------------------------------------------------------------------------------------------------------


@require_scope("members:read")
async def members(request: Request) -> Response:
    found = await tenancy_of(request).members.list(current_tenant())
    emails = await people_of(request).emails([member.subject for member in found])
    return JSONResponse(
        [{"id": member.subject, "email": emails.get(member.subject), "roles": sorted(member.roles)} for member in found]
    )


@require_scope("members:write")
async def invite(request: Request) -> Response:
    fields = await read_fields(request, "email", "role")
    role = fields["role"]
    if role not in ROLES:
        raise HTTPException(422, f"role must be one of {', '.join(ROLES)}")
    # nobody gives more than they have
    demand_scopes(request, *ROLES[role])
    invitation = await tenancy_of(request).members.invite(
        current_tenant(), roles=[role], email=fields["email"], actor=actor_of(request)
    )
    # a product sends it by mail, to the person alone
    return JSONResponse({"invitation": invitation.text}, 201)


@require_scope("members:write")
async def remove_member(request: Request) -> Response:
    subject = request.path_params["subject"]
    if subject == person_of(request).subject:
        raise HTTPException(409, "you cannot remove yourself: a team needs an owner")
    tenancy = tenancy_of(request)
    for member in await tenancy.members.list(current_tenant()):
        if member.subject == subject:
            # nobody removes those who have more
            demand_scopes(request, *tenancy.config.members.scopes_of(member.roles))
    await tenancy.members.remove(current_tenant(), subject, actor=actor_of(request))
    return Response(status_code=204)


@require_scope("keys:write")
async def issue_key(request: Request) -> Response:
    """Issue an API key for a program of the team, which may write notes."""
    fields = await read_fields(request, "name")
    issued = await tenancy_of(request).keys.issue(
        current_tenant(), name=fields["name"], scopes=ROLES["editor"], actor=actor_of(request)
    )
    return JSONResponse({"key": issued.text}, 201)


routes = [
    Route("/me/tenants", my_teams, methods=["GET"]),
    Route("/me/teams", create_team, methods=["POST"]),
    Route("/me/invitations", accept, methods=["POST"]),
    Route("/members", members, methods=["GET"]),
    Route("/members/{subject}", remove_member, methods=["DELETE"]),
    Route("/invitations", invite, methods=["POST"]),
    Route("/keys", issue_key, methods=["POST"]),
]
