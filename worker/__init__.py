"""The worker processes: they claim jobs, run each one in a child process and send results to MLflow.

No worker process loads TensorFlow; only its child processes do.
"""
