"""Turns off the telemetry of every library that has some, before its import. Each package with a process calls it.

The environment is set as well, because child processes and libraries written in C++ read it.
"""

from __future__ import annotations

import os
import sys

VARIABLES = {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "NNCF_CI": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}


def turn_off_telemetry() -> None:
    """Set the variables that libraries read, and make OpenVINO's telemetry package impossible to import.

    That package has no switch but a file in the home folder. With it, `import openvino` forks a process that sends an
    event, and that fork can hang for ever among the threads of TensorFlow. Without it, OpenVINO and NNCF use stubs.
    """
    os.environ.update(VARIABLES)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
