"""Exports of a tenant's data that need no PostgreSQL, and certificates of its erasure."""
