"""The databases that tenants' databases are cloned from."""
