"""Benchmarks behind docs/benchmarks.md. Each measures a ratio to a baseline in the same run, not times alone."""
