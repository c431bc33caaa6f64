"""What tenants exist: the control database and everything that reads and writes it."""
