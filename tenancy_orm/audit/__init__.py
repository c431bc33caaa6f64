"""The audit log, one hash chain of who did what to which tenant: actors, entries, checkpoints, verification."""
