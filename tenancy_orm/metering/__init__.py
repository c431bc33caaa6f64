"""Samples and metrics of tenants' databases, usage records for billing, and tier policies."""
