"""Users: as many as the customer's tier pays for."""

from __future__ import annotations

from sqlalchemy.exc import IntegrityError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tenancy_orm import current_tenant

from ..models import User
from ..problems import ProblemError
from ..schemas import Input, Output, UserInput, UserOutput
from .resource import Resource, tenancy_of


class Users(Resource):
    """Users; each one takes a seat of the tier's ``users`` quota."""

    @property
    def routes(self) -> list[Route]:
        """The routes of every resource, and DELETE, which releases a seat."""
        return [*super().routes, Route("/users/{id}", self.delete, methods=["DELETE"])]

    async def insert(self, request: Request, body: Input) -> Output:
        """Take a seat, then insert; release the seat if the row is refused."""
        quotas, tenant = tenancy_of(request).quotas, current_tenant()
        await quotas.consume(tenant, "users")
        try:
            return await super().insert(request, body)
        except BaseException:
            await quotas.release(tenant, "users")
            raise

    async def delete(self, request: Request) -> Response:
        """Delete a user who owns no agents, and release the seat."""
        identity = self.identity(request)
        tenancy = tenancy_of(request)
        try:
            async with tenancy.transaction() as session:
                row = await session.get(User, identity)
                if row is None:
                    raise self.missing
                await session.delete(row)
        except IntegrityError as exc:
            raise ProblemError(409, "this user owns agents; give or take those away first") from exc
        await tenancy.quotas.release(current_tenant(), "users")
        return Response(status_code=204)


users = Users(name="users", model=User, input=UserInput, output=UserOutput)
