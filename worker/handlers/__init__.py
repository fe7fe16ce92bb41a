"""The handlers of jobs, one module for each kind: they start child processes, store results and write rows."""
