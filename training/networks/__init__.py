"""Keras networks and their exported files: backbones, ONNX export, int8 quantisation and the choice of precision."""
