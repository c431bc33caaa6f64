"""Rehearsal: a migration, tried on clones of tenants before it runs."""
