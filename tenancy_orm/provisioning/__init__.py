"""Tenants' databases and roles: templates, creation step by step, removal, reconciling after a crash, the watchdog."""

from .provisioner import Provisioner
from .reconcile import ReconcileReport
from .templates import SchemaSource, TemplateInfo
from .watchdog import EndedSession, WatchReport

__all__ = ["EndedSession", "Provisioner", "ReconcileReport", "SchemaSource", "TemplateInfo", "WatchReport"]
