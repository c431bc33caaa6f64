"""Applications that use tenancy_orm, to run and to read."""
