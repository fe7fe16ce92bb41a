"""One file for each kind of job: what the worker does before, during and after its child process."""
