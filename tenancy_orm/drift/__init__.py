"""Drift: schemas of tenants that are not what their revisions say."""
