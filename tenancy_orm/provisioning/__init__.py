"""Tenants' databases and roles: templates, creation step by step, removal, reconciling after a crash, the watchdog."""

from .differences import Difference
from .provisioner import Provisioner
from .reconcile_report import ReconcileReport
from .template_manager import Template, TemplateManager, TemplatePruneReport
from .templates import SchemaSource, TemplateInfo
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
