"""The smallest network that an engine runs, made without Keras."""

from __future__ import annotations

from onnx import TensorProto, helper


def mean_colour(name: str) -> bytes:
    """Return a network that is another file for every name: the mean colour of an image of 8 x 8 pixels."""
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
