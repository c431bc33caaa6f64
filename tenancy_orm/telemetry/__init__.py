"""What is told about an application to logs: ``TenantLogFilter`` names the tenant and the request in each record."""

from .logs import TenantLogFilter

__all__ = ["TenantLogFilter"]
