"""``tenancy worker``: does jobs, on any number of machines, each job in one process at a time."""
