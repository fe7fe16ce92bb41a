"""Commands for operators: the supervised service, the demo, the import of weights, the migration."""

from no_telemetry import turn_off_telemetry

turn_off_telemetry()
