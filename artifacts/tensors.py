"""Files of arrays with plain values beside them: safetensors, whose metadata holds the values as JSON. Never code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

Tensors = dict[str, npt.NDArray[Any]]

UNREADABLE = (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError)
"""What reading a file raises that is not what it should be."""


def dump(values: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return a file."""
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    return save_tensors(arrays, metadata={"espalier": json.dumps(values, sort_keys=True, ensure_ascii=False)})


def load_values(data: bytes) -> dict[str, Any]:
    """Return the values of a file, reading 8 bytes of length and then JSON (the format's own specification).

    Raises one of UNREADABLE.
    """
    length = int.from_bytes(data[:8], "little")
    header: Mapping[str, Any] = json.loads(data[8 : 8 + length])
    values: dict[str, Any] = json.loads(header["__metadata__"]["espalier"])
    return values


def load(data: bytes) -> tuple[dict[str, Any], Tensors]:
    """Return the values and the arrays of a file. Raises one of UNREADABLE."""
    return load_values(data), load_tensors(data)
