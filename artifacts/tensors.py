"""Reads and writes safetensors files: arrays, and in the metadata plain values as JSON. They never contain code."""

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
"""Exceptions that may be raised when an invalid file is read."""


def dump(values: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return the bytes of a file with these values and arrays. Equal values and arrays give equal bytes."""
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    return save_tensors(arrays, metadata={"espalier": json.dumps(values, sort_keys=True, ensure_ascii=False)})


def load_values(data: bytes) -> dict[str, Any]:
    """Return the values in a file's metadata, without reading its arrays. Raises one of UNREADABLE.

    A safetensors file begins with 8 bytes for the length of its header, followed by the header as JSON.
    """
    length = int.from_bytes(data[:8], "little")
    header: Mapping[str, Any] = json.loads(data[8 : 8 + length])
    values: dict[str, Any] = json.loads(header["__metadata__"]["espalier"])
    return values


def load(data: bytes) -> tuple[dict[str, Any], Tensors]:
    """Return the values and the arrays of a file. Raises one of UNREADABLE."""
    return load_values(data), load_tensors(data)
