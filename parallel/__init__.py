"""One rank among many: collectives, sharding arithmetic, units, the action vocabulary. Knows nothing of plans or Ray."""
