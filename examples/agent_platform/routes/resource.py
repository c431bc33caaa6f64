"""List, create and get rows of one table over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, Field, TypeAdapter
from sqlalchemy import select
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tenancy_orm import Tenancy

from ..paging import decode_cursor, encode_cursor, page
from ..problems import ProblemError
from ..schemas import Input, Output, PageQuery

_UUID_KEY: TypeAdapter[UUID] = TypeAdapter(UUID)
_BIGINT_KEY: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(ge=1, le=2**63 - 1)])


def tenancy_of(request: Request) -> Tenancy:
    """Return the application's ``Tenancy``."""
    tenancy: Tenancy = request.app.state.tenancy
    return tenancy


def answer(model: BaseModel, status: int = 200) -> Response:
    """Answer with ``model`` as JSON."""
    return Response(model.model_dump_json(), status, media_type="application/json")


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Routes over one table.

    No handler names a tenant: ``session()`` and ``transaction()`` open the database of the tenant
    that the middleware bound from the request's key.
    """

    name: str
    model: Any
    input: type[Input]
    output: type[Output]
    query: type[PageQuery] = PageQuery

    @property
    def routes(self) -> list[Route]:
        """The resource's routes."""
        return [
            Route(f"/{self.name}", self.list, methods=["GET"]),
            Route(f"/{self.name}", self.create, methods=["POST"]),
            Route(f"/{self.name}/{{id}}", self.get, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """Return one page, newest first."""
        query = self.query.model_validate_strings(dict(request.query_params))
        after = None if query.after is None else decode_cursor(query.after, self.key)
        filters = query.model_dump(exclude={"limit", "after"}, exclude_none=True)
        statement = page(select(self.model).filter_by(**filters), self.model, limit=query.limit, after=after)
        async with tenancy_of(request).session() as session:
            rows = (await session.scalars(statement)).all()
            shown = rows[: query.limit]
            items = [self.output.model_validate(row).model_dump(mode="json") for row in shown]
            more = encode_cursor(shown[-1]) if len(rows) > len(shown) else None
        return JSONResponse({"items": items, "next": more})

    async def create(self, request: Request) -> Response:
        """Insert a row and return it."""
        body = self.input.model_validate_json(await request.body())
        return answer(await self.insert(request, body), 201)

    async def insert(self, request: Request, body: Input) -> Output:
        """Insert the row that ``body`` describes."""
        async with tenancy_of(request).transaction() as session:
            row = self.model(**body.model_dump())
            session.add(row)
            await session.flush()
            return self.output.model_validate(row)

    async def get(self, request: Request) -> Response:
        """Return one row by its id."""
        identity = self.identity(request)
        async with tenancy_of(request).session() as session:
            row = await session.get(self.model, identity)
            if row is None:
                raise self.missing
            return answer(self.output.model_validate(row))

    def identity(self, request: Request) -> Any:
        """Return the id in the path; a text that cannot be an id is not found."""
        try:
            return self.key.validate_strings(request.path_params["id"])
        except ValueError:
            raise self.missing from None

    @property
    def key(self) -> TypeAdapter[Any]:
        """The parser of this table's ids."""
        return _UUID_KEY if self.model.id.type.python_type is UUID else _BIGINT_KEY

    @property
    def missing(self) -> ProblemError:
        """The answer if the tenant has no row with this id."""
        return ProblemError(404, f"no such row in {self.name}")
