"""A world for the real code of jobs: clocks, stores, broker, database and faults, all decided by a seed."""
