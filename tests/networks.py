"""Very small ONNX networks for tests of engines, made without Keras."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def mean_colour(name: str) -> bytes:
    """Return an ONNX network that computes the mean colour of an image of 8 x 8 pixels.

    Each name gives a different file.
    """
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 8, 8, 3])
    outputs = [
        helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["n", 8, 8, 3]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3]),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["maps"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["maps"], ["features"], axes=[1, 2], keepdims=0),
    ]
    graph = helper.make_graph(nodes, name, [images], outputs)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    return bytes(model.SerializeToString())


FILTERS = np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 1], [0, 0, 0]], np.float32)
"""The filters of the layer `first` in `layered`: four channels from the red, green and blue of a pixel."""


def layered() -> bytes:
    """Return an ONNX network with the layers `first` and `pool`, for images of 8 x 8 pixels.

    Its tensors are named as in an exported Keras network.
    """
    inside = "functional_1/net_1"
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 8, 8, 3])
    outputs = [
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 4]),
        helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["n", 4, 4, 4]),
    ]
    kernel = numpy_helper.from_array(FILTERS[:, :, None, None], "kernel")
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    chain = ["images", "functional_1/Cast:0", f"{inside}/first_1/convolution__7:0", f"{inside}/first_1/convolution:0"]
    chain += [f"{inside}/first_1/Relu:0", f"{inside}/pool_1/MaxPool2d:0", "functional_1/features_1/Mean:0", "features"]
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Cast", [], {"to": TensorProto.FLOAT}),
        ("Transpose", [], {"perm": [0, 3, 1, 2]}),
        ("Conv", ["kernel"], {}),
        ("Relu", [], {}),
        ("MaxPool", [], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("GlobalAveragePool", [], {}),
        ("Squeeze", ["axes"], {}),
    ]
    nodes = [
        helper.make_node(kind, [before, *more], [after], name=after.removesuffix(":0"), **options)
        for (kind, more, options), before, after in zip(steps, chain[:-1], chain[1:], strict=True)
    ]
    nodes.append(helper.make_node("Transpose", [chain[5]], ["maps"], perm=[0, 2, 3, 1]))
    graph = helper.make_graph(nodes, "layered", [images], outputs, initializer=[kernel, axes])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    return bytes(model.SerializeToString())
