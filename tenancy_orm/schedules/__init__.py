"""Schedules per tenant: whose time has come, in each tenant's own time zone."""

from .manager import DueTenants, Schedule, ScheduleManager

__all__ = ["DueTenants", "Schedule", "ScheduleManager"]
