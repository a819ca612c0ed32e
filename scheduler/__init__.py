"""Choosing: plans, programs, passes, traces. Pure decisions; knows nothing of processes or Ray."""
