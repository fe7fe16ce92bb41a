"""Runs exported networks for predictions: arrays in, arrays out. Knows no TensorFlow, SQL or HTTP."""
