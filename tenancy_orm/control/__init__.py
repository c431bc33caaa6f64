"""The control database: connection, tables, row security, notifications, and the look-up of tenants by name."""
