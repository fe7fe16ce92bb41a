"""Chooses between OpenVINO and ONNX Runtime for predictions. Imports ONNX Runtime only if it may be used."""

from __future__ import annotations

from typing import Literal

from errors import EngineMissing
from inference.engine import OpenVinoEngine
from inference.shelf import EngineLoader


def choose_engine_loader(choice: Literal["auto", "openvino", "onnxruntime"]) -> EngineLoader:
    """Return the engine class that loads networks.

    Args:
        choice: the name of an engine. `auto` means ONNX Runtime if it finds a GPU with CUDA, and OpenVINO otherwise.

    Raises:
        EngineMissing: the choice is `onnxruntime`, but its package is not installed.
    """
    if choice == "openvino":
        return OpenVinoEngine
    try:
        from inference.onnx_engine import OnnxEngine, finds_cuda
    except ImportError as error:
        if choice == "auto":
            return OpenVinoEngine
        raise EngineMissing(
            "ESPALIER_ENGINE=onnxruntime needs a package that is not installed: onnxruntime, or onnxruntime-gpu for a "
            "GPU with CUDA. Install requirements/api.txt or requirements/api-gpu.txt, or set ESPALIER_ENGINE=openvino. "
            f"Received: {error}."
        ) from error
    return OnnxEngine if choice == "onnxruntime" or finds_cuda() else OpenVinoEngine
