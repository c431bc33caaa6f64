"""What logs say about a request: ``TenantLogFilter`` names the tenant and the request in each record."""

from .logs import TenantLogFilter

__all__ = ["TenantLogFilter"]
