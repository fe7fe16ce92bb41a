"""Environment variables without secrets, for processes that decode files of strangers or answer without a key.

Only variables that are listed here reach these processes. A list of secrets to remove instead would miss any secret
that it does not name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_NAMES = frozenset(
    {
        # The data folder. It also shows to which service a process belongs.
        "ESPALIER_VAR",
        "HOME",
        "LANG",
        "LANGUAGE",
        "LOGNAME",
        "PATH",
        "SHELL",
        "TEMP",
        "TERM",
        "TMP",
        "TMPDIR",
        "TZ",
        "USER",
        "VIRTUAL_ENV",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_RUNTIME_DIR",
        # Where the loader finds libraries, and which GPUs a container has.
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "NVIDIA_DRIVER_CAPABILITIES",
        "NVIDIA_TF32_OVERRIDE",
        "NVIDIA_VISIBLE_DEVICES",
        # Certificates of a network with its own authority.
        "CURL_CA_BUNDLE",
        "REQUESTS_CA_BUNDLE",
        "SSL_CERT_DIR",
        "SSL_CERT_FILE",
        # Turn off telemetry.
        "DO_NOT_TRACK",
        "HF_HUB_DISABLE_TELEMETRY",
        "MLFLOW_DISABLE_TELEMETRY",
        "NNCF_CI",
        "ORT_DISABLE_TELEMETRY",
    }
)
# Variables of the Python interpreter and of numerical libraries. The prefixes `TF_` and `NVIDIA_` would be too wide:
# other programs have keys in variables that begin with them.
_PREFIXES = (
    "CUDA_",
    "CUDNN_",
    "DYLD_",
    "GOMP_",
    "KERAS_",
    "KMP_",
    "LC_",
    "MALLOC_",
    "MKL_",
    "MPL",
    "NUMEXPR_",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "OPENVINO_",
    "OV_",
    "PYTHON",
    "TF_CPP_",
    "TF_CUDNN_",
    "TF_DETERMINISTIC_",
    "TF_ENABLE_",
    "TF_FORCE_",
    "TF_GPU_",
    "TF_NUM_",
    "TF_XLA_",
    "XLA_",
)
_PROXIES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def without_secrets(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of an environment that hold no secrets."""
    return {name: value for name, value in environment.items() if name in _NAMES or name.startswith(_PREFIXES)}


def proxies(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that name proxies, for a process that downloads files. They may contain a password."""
    return {name: value for name, value in environment.items() if name.upper() in _PROXIES}
