"""Schedules per tenant: which tenants are due, in each tenant's own time zone."""

from .manager import DueTenants, Schedule, ScheduleManager

__all__ = ["DueTenants", "Schedule", "ScheduleManager"]
