"""Backups of tenants' databases: made, encrypted, stored, verified, pruned."""
