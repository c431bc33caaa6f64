"""The application: ``uvicorn examples.team_notes.app:app``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tenancy_orm import Tenancy
from tenancy_orm.asgi import ApiKeyAuthenticator, PathPrefixResolver, TenancyMiddleware

from . import login, notes, people, teams, webhooks
from .settings import Settings, create_config, create_settings


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def create_app(tenancy: Tenancy, settings: Settings) -> Starlette:
    """Return the application; its lifespan opens and closes ``tenancy``."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        settings.check()
        async with (
            tenancy.lifespan(app),
            people.database(settings.people_url) as url,
            people.opened(url) as app.state.people,
        ):
            yield

    app = Starlette(
        routes=[
            Route("/healthz", health),
            *login.routes,
            *teams.routes,
            *notes.routes,
            *webhooks.routes,
        ],
        middleware=[
            # outside of the other, which reads the session
            Middleware(
                SessionMiddleware,
                secret_key=settings.session_secret,
                # a browser takes __Host- only with Secure, for path /, and never from another host of the domain
                session_cookie="__Host-session",
                https_only=True,
                same_site="lax",
                max_age=int(login.SESSION_LIFETIME.total_seconds()),
            ),
            Middleware(
                TenancyMiddleware,
                tenancy=tenancy,
                authenticators=[ApiKeyAuthenticator(), login.LoginSession()],
                resolvers=[PathPrefixResolver("/t/{tenant}")],
                exempt=["/healthz", "/signup", "/login", "/webhooks/payments"],
                without_tenant=["/me/*"],
                public=["/p/*"],
            ),
        ],
        lifespan=lifespan,
    )
    app.state.tenancy = tenancy
    app.state.settings = settings
    return app


tenancy = Tenancy(create_config())
app = create_app(tenancy, create_settings())
