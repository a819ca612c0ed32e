"""Measuring from outside: benchmark cases, peers, tables. Nothing below imports it."""
