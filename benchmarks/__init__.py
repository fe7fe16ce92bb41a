"""The benchmarks behind docs/benchmarks.md. Each measures a ratio to a baseline that runs on the same machine."""
