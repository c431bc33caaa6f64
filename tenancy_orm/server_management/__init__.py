"""Servers are added, changed, drained and removed."""
