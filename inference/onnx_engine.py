"""Runs an exported backbone with ONNX Runtime, on an NVIDIA GPU if there is one. Knows no heads and no settings.

Its package is optional: only `inference.engine_choice` imports this module, and only if it is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from artifacts.features import Features
from artifacts.images import Pixels
from errors import OutOfMemory, PrecisionUnsupported
from recipes.recipe import Precision

CUDA, PROCESSOR = "CUDAExecutionProvider", "CPUExecutionProvider"

Provider = tuple[str, dict[str, str]]

# An int8 file holds its quantised operations itself; ONNX Runtime has no option to compute in bfloat16.
_HONOURED = (Precision.FLOAT32, Precision.INT8)
_ONLY_ERRORS = 3
# Parts of its messages when memory runs out; it has no exception class for that.
_NO_ROOM = ("failed to allocate memory", "out of memory", "alloc_failed", "bad_alloc")
# A network of one addition, x + x of two numbers, as ONNX 1.x writes it.
_ADDITION = bytes.fromhex(
    "08083a3c0a0e0a01780a0178120179220341646412086164646974696f6e5a0f0a0178120a0a08080112040a02080262"
    "0f0a0179120a0a08080112040a02080242040a00100d"
)


def provider_options(has_cuda: bool) -> list[Provider]:
    """Return the execution providers with their options, in order of preference."""
    processor: Provider = (PROCESSOR, {})
    if not has_cuda:
        return [processor]
    options = {
        # TensorFloat-32 is on by default, but its mantissa has 10 bits: float32 scores would not be reproduced.
        "use_tf32": "0",
        # By default it tries every algorithm at the first batch of each size, which takes seconds.
        "cudnn_conv_algo_search": "HEURISTIC",
        # By default it doubles its memory each time, but several networks share the GPU.
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [(CUDA, options), processor]


@cache
def finds_cuda() -> bool:
    """Return whether a network runs on a GPU here; tried once with a network of one addition."""
    if CUDA not in onnxruntime.get_available_providers():
        return False
    onnxruntime.preload_dlls()  # CUDA libraries from Python packages, which the system loader does not find
    try:
        return runs_on(CUDA, provider_options(has_cuda=True))
    except Exception:  # a missing driver or device and an old one raise different errors
        return False


def runs_on(wanted: str, providers: Sequence[Provider]) -> bool:
    """Return whether `wanted` is the first active provider and computes one addition correctly."""
    session = _session(_ADDITION, 1, providers)
    [found] = session.run(None, {"x": np.array([1, 2], np.float32)})
    return bool(session.get_providers()[0] == wanted and found.tolist() == [2, 4])


class OnnxEngine:
    """An ONNX network run by ONNX Runtime: on the GPU if there is one, else on the processor."""

    name = "onnxruntime"

    def __init__(self, network: Path, precision: Precision, threads: int) -> None:
        """Load a network. Raises PrecisionUnsupported and OutOfMemory."""
        if precision not in _HONOURED:
            raise PrecisionUnsupported(
                f"The engine onnxruntime supports {' and '.join(_HONOURED)}. Received a model of precision "
                f"{precision}. Serve it with ESPALIER_ENGINE=openvino."
            )
        with _out_of_memory_errors("the network"):
            self._session = _session(str(network), threads, provider_options(finds_cuda()))
        [given] = self._session.get_inputs()
        self._input = given.name

    def features(self, images: Pixels) -> Features:
        """Return float32 [N, D] for uint8 images [N, H, W, 3]."""
        return self.run(images, wants_maps=False)[0]

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return features float32 [N, D] and, with `wants_maps`, the maps float32 [N, h, w, D] that they average.

        Raises OutOfMemory if the batch is too large.
        """
        outputs = ["features", "maps"] if wants_maps else ["features"]
        with _out_of_memory_errors(f"a batch of {len(images)} images"):
            features, *maps = self._session.run(outputs, {self._input: np.ascontiguousarray(images)})
        return features, maps[0] if maps else None


def _session(network: str | bytes, threads: int, providers: Sequence[Provider]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would take processor time from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _ONLY_ERRORS
    # Its fallback would silently continue without the GPU.
    return onnxruntime.InferenceSession(network, options, providers=list(providers), enable_fallback=0)


@contextlib.contextmanager
def _out_of_memory_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not any(words in str(error).lower() for words in _NO_ROOM):
            raise
        where = "on the GPU" if finds_cuda() else "on this machine"
        raise OutOfMemory(
            f"Not enough memory {where} for {what}. Lower ESPALIER_SHELF_BYTES, or stop other programs that "
            "use this memory."
        ) from error
