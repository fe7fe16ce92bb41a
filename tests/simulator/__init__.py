"""Simulates everything around the real code of jobs: clocks, store, broker, database and faults, from a seed."""
