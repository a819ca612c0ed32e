"""Settings of all tests: properties try the same examples every time, however slow the machine is."""

from hypothesis import settings

settings.register_profile("same-every-time", derandomize=True, deadline=None, database=None)
settings.load_profile("same-every-time")
