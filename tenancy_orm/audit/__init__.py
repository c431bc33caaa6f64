"""Who did what to which tenant, in one hash chain: actors, the log, its checkpoints and its proof."""
