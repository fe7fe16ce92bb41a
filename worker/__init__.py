"""The worker processes: they claim jobs, run each one in a child process and send results to MLflow.

No worker process loads TensorFlow; only its child processes do.
"""

from no_telemetry import turn_off_telemetry

turn_off_telemetry()
