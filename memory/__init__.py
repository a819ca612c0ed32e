"""Bytes on one rank: tiers, chunks, lanes, timelines, budgets. Knows nothing of ranks or plans."""
