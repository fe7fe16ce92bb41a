"""Runs exported networks and heads to predict on images. Knows no TensorFlow, no SQL and no HTTP."""

from no_telemetry import turn_off_telemetry

turn_off_telemetry()
