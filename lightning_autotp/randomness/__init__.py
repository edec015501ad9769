"""Random numbers of ranks that share a model: the unsharded run's own, of which each rank takes its part."""
