"""The rows of tenants: reading, creation, transitions, purge."""
