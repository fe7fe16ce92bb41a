"""Networks that answer: arrays in, arrays out. Knows no TensorFlow, SQL or HTTP."""
