"""Checks that OpenVINO works on this machine, by running a network with a single addition. Loads no model."""

from __future__ import annotations

from functools import cache

import numpy as np
import openvino
from openvino import opset13


@cache
def cpu() -> str:
    """Run a test network on the CPU and return the CPU's name. Later calls return the name without running it.

    Raises RuntimeError if the network does not run or gives a wrong result.
    """
    return probe("CPU")


def probe(device: str) -> str:
    """Compile a network for a device, run it, and return the device's name. Raises RuntimeError if that fails."""
    core = openvino.Core()
    given = opset13.parameter([2], np.float32, "given")
    network = openvino.Model([opset13.add(given, np.float32(1))], [given], "probe")
    found = core.compile_model(network, device, {"INFERENCE_NUM_THREADS": 1})([np.array([1, 2], np.float32)])[0]
    if found.tolist() != [2, 3]:
        raise RuntimeError(f"The engine computed {found.tolist()} instead of [2, 3].")
    return str(core.get_property(device, "FULL_DEVICE_NAME"))
