"""Trains networks. The only room that imports TensorFlow and Keras. Knows no SQL, no HTTP and no settings."""

from no_telemetry import turn_off_telemetry

turn_off_telemetry()
