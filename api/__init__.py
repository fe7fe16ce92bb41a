"""The HTTP API. It writes jobs to the database and answers predictions. Loads no TensorFlow and no worker."""

from no_telemetry import turn_off_telemetry

turn_off_telemetry()
