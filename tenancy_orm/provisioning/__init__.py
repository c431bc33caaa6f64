"""Databases come and go: the templates, the creation of a tenant step by step, its end, and what a crash has left."""

from .provisioner import Provisioner
from .reconcile import ReconcileReport
from .templates import SchemaSource, TemplateInfo
from .watchdog import EndedSession, WatchReport

__all__ = ["EndedSession", "Provisioner", "ReconcileReport", "SchemaSource", "TemplateInfo", "WatchReport"]
