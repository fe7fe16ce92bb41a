"""Networks that learn: the only room that knows TensorFlow and Keras. Arrays in, arrays out; no SQL, no HTTP."""
