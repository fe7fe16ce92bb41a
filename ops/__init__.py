"""Commands for operators, such as starting the service on one machine, the demo, and migrating the database."""

from no_telemetry import turn_off_telemetry

turn_off_telemetry()
