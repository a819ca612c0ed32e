"""One rank among many: collectives, sharding, units, the action vocabulary. Knows nothing of plans or Ray."""
