"""Runs exported networks and heads to predict on images. Knows no TensorFlow, no SQL and no HTTP."""
