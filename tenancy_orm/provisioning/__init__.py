"""Tenants' databases and roles: templates, creation step by step, removal, reconciling after a crash, the watchdog."""

from .checks.differences import Difference
from .checks.report import ReconcileReport
from .provisioner import Provisioner
from .templates.building import SchemaSource, TemplateInfo
from .templates.manager import Template, TemplateManager, TemplatePruneReport
from .warm_pool import WarmPool, WarmReport, WarmStatus
from .watchdog import EndedSession, WatchReport

__all__ = [
    "Difference",
    "EndedSession",
    "Provisioner",
    "ReconcileReport",
    "SchemaSource",
    "Template",
    "TemplateInfo",
    "TemplateManager",
    "TemplatePruneReport",
    "WarmPool",
    "WarmReport",
    "WarmStatus",
    "WatchReport",
]
