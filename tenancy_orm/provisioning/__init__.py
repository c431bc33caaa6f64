"""Databases come and go: the templates, the creation of a tenant step by step, its end, and what a crash has left."""

from .provisioner import Provisioner
from .reconcile import ReconcileReport
from .templates import SchemaSource, TemplateInfo

__all__ = ["Provisioner", "ReconcileReport", "SchemaSource", "TemplateInfo"]
