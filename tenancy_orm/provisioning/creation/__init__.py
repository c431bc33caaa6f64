"""How a tenant's database comes, step by step, and goes."""
