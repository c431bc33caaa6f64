"""Notes, with a PostgreSQL database for each tenant. README.md beside this file shows how to run it."""

from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.asgi import TenancyMiddleware


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


tenancy = Tenancy(TenancyConfig(control_url="embedded:.tenancy", metadata=Base.metadata))


async def notes(request: Request) -> JSONResponse:
    async with tenancy.transaction() as session:  # in the database of the key's tenant
        if request.method == "POST":
            session.add(Note(text=(await request.json())["text"]))
        return JSONResponse([note.text for note in await session.scalars(select(Note))])


app = Starlette(
    routes=[Route("/notes", notes, methods=["GET", "POST"])],
    middleware=[Middleware(TenancyMiddleware, tenancy=tenancy)],
    lifespan=tenancy.lifespan,
)
