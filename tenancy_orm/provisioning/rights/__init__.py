"""What a tenant's role may do in its database, and what everybody else may not."""
