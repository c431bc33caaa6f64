"""The control database: its connection, its tables, who may see which rows, its notifications, tenants by name."""
