"""Checks that the engine of predictions works on this machine, with a network of one addition. Loads no model."""

from __future__ import annotations

from functools import cache

import numpy as np
import openvino
from openvino import opset13


@cache
def cpu() -> str:
    """Return the processor's name after a test network has run on it; later calls skip the test. Raises as `probe`."""
    return probe("CPU")


def probe(device: str) -> str:
    """Compile a network for a device, run it, and return the device's name. Raises RuntimeError if that fails."""
    core = openvino.Core()
    given = opset13.parameter([2], np.float32, "given")
    network = openvino.Model([opset13.add(given, np.float32(1))], [given], "probe")
    found = core.compile_model(network, device, {"INFERENCE_NUM_THREADS": 1})([np.array([1, 2], np.float32)])[0]
    if found.tolist() != [2, 3]:
        raise RuntimeError(f"The engine answered {found.tolist()}, expected [2, 3].")
    return str(core.get_property(device, "FULL_DEVICE_NAME"))
