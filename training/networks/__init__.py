"""Keras networks and their exported files: backbones, ONNX export, int8 and the choice of precision."""
