"""Trains networks. The only room that imports TensorFlow and Keras. Knows no SQL, no HTTP and no settings."""
