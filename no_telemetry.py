"""Turns off the telemetry of libraries. The packages `api`, `worker` and so on call it before they import a library.

It also sets environment variables, because child processes and libraries written in C++ read them.
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
    """Set the variables that turn telemetry off, and prevent the import of OpenVINO's telemetry package.

    Only a file in the home folder turns that package off. Otherwise `import openvino` forks a process that sends an
    event, and the forked process can hang for ever, because TensorFlow's threads held locks when it was forked. If the
    package cannot be imported, OpenVINO and NNCF use stubs that send nothing.
    """
    os.environ.update(VARIABLES)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
