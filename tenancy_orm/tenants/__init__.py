"""Tenants as an application manages them: ``TenantManager``, domains, tiers."""
