"""Moves of tenants to another server."""
