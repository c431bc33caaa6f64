"""The middleware for WSGI applications: Flask, and what else is served by threads. Needs the extra ``sync``."""

from __future__ import annotations

from .middleware import TenancyWSGIMiddleware, answer_with, credential_of, demand_scopes

__all__ = ["TenancyWSGIMiddleware", "answer_with", "credential_of", "demand_scopes"]
