"""Runs exported networks for predictions: arrays in, arrays out. Knows no TensorFlow, SQL or HTTP."""

from no_telemetry import turn_off_telemetry

turn_off_telemetry()
