"""Networks that learn: the only room that knows TensorFlow and Keras. Arrays in, arrays out; no SQL, no HTTP."""

from no_telemetry import turn_off_telemetry

turn_off_telemetry()
