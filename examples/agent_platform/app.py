"""The application: ``uvicorn examples.agent_platform.app:app``."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tenancy_orm import Tenancy
from tenancy_orm.asgi import SubdomainResolver, TenancyMiddleware

from .problems import HANDLERS
from .routes import routes
from .settings import create_config


async def health(request: Request) -> JSONResponse:
    """Answer that the process serves requests. The middleware exempts this path, so it needs no key."""
    return JSONResponse({"status": "ok"})


def create_app(tenancy: Tenancy) -> Starlette:
    """Return the application; its lifespan opens and closes ``tenancy``."""
    middleware = Middleware(
        TenancyMiddleware,
        tenancy=tenancy,
        resolvers=[SubdomainResolver("localhost"), SubdomainResolver("example.test")],
        exempt=["/healthz"],
    )
    app = Starlette(
        routes=[Route("/healthz", health), *routes],
        lifespan=tenancy.lifespan,
        middleware=[middleware],
        exception_handlers=HANDLERS,
    )
    app.state.tenancy = tenancy
    return app


tenancy = Tenancy(create_config())
app = create_app(tenancy)
