"""Adoption: an existing database, schema, or set of rows becomes a tenant."""

from .fleet import FleetAdoption, FleetOutcome, FleetReport, FleetTable
from .fleet_plan import AdoptionPlan, PlannedTenant
from .manager import AdoptionManager
from .mapping import RowsMapping, TableMapping
from .report import AdoptedTable, AdoptionReport
from .rows import RowsAdoption
from .rows_report import RowsReport, TableRows

__all__ = [
    "AdoptedTable",
    "AdoptionManager",
    "AdoptionPlan",
    "AdoptionReport",
    "FleetAdoption",
    "FleetOutcome",
    "FleetReport",
    "FleetTable",
    "PlannedTenant",
    "RowsAdoption",
    "RowsMapping",
    "RowsReport",
    "TableMapping",
    "TableRows",
]
