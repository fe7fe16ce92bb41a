"""Runs exported backbones with ONNX Runtime, on an NVIDIA GPU if there is one. Knows no heads and no settings.

The package onnxruntime is optional. So only `inference.engine_choice` imports this module, and only if it is needed.
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

# An int8 file contains quantised operations. bfloat16 is missing, because ONNX Runtime has no option for it.
_HONOURED = (Precision.FLOAT32, Precision.INT8)
_ONLY_ERRORS = 3
# Parts of ONNX Runtime's messages if memory runs out, for which it has no exception class.
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
        # Off, because TensorFloat-32 has a mantissa of 10 bits, which is too few to reproduce float32 scores.
        "use_tf32": "0",
        # By default ONNX Runtime tries every algorithm at the first batch of each size, which takes seconds.
        "cudnn_conv_algo_search": "HEURISTIC",
        # By default ONNX Runtime doubles its memory whenever it needs more, but several networks share the GPU.
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [(CUDA, options), processor]


@cache
def finds_cuda() -> bool:
    """Return whether networks run on a GPU on this machine. The first call tries it with a tiny network."""
    if CUDA not in onnxruntime.get_available_providers():
        return False
    onnxruntime.preload_dlls()  # CUDA libraries from Python packages, which the system loader does not find
    try:
        return runs_on(CUDA, provider_options(has_cuda=True))
    except Exception:  # a missing driver, a missing device and an old device all raise different errors
        return False


def runs_on(provider: str, providers: Sequence[Provider]) -> bool:
    """Return whether ONNX Runtime really uses `provider` first, and whether it computes one addition correctly."""
    session = _session(_ADDITION, 1, providers)
    [found] = session.run(None, {"x": np.array([1, 2], np.float32)})
    return bool(session.get_providers()[0] == provider and found.tolist() == [2, 4])


class OnnxEngine:
    """An ONNX network run by ONNX Runtime: on the GPU if there is one, else on the processor."""

    name = "onnxruntime"

    def __init__(self, network: Path, precision: Precision, threads: int) -> None:
        """Load a network. Raises PrecisionUnsupported and OutOfMemory."""
        if precision not in _HONOURED:
            raise PrecisionUnsupported(
                f"The engine onnxruntime supports only {' and '.join(_HONOURED)}, but the model has precision "
                f"{precision}. Serve this model with ESPALIER_ENGINE=openvino."
            )
        with _out_of_memory_errors("the network"):
            self._session = _session(str(network), threads, provider_options(finds_cuda()))
        [given] = self._session.get_inputs()
        self._input = given.name

    def features(self, images: Pixels) -> Features:
        """Return features float32 [N, D] for images uint8 [N, H, W, 3]."""
        return self.run(images, wants_maps=False)[0]

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return features float32 [N, D] and, with `wants_maps`, maps float32 [N, h, w, D].

        The features are the mean of the maps over height and width. Without `wants_maps`, the second value is None.

        Raises:
            OutOfMemory: the batch is too large for the memory.
        """
        outputs = ["features", "maps"] if wants_maps else ["features"]
        with _out_of_memory_errors(f"a batch of {len(images)} images"):
            features, *maps = self._session.run(outputs, {self._input: np.ascontiguousarray(images)})
        return features, maps[0] if maps else None


def _session(network: str | bytes, threads: int, providers: Sequence[Provider]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Off, because spinning threads would take processor time from the decoding of images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _ONLY_ERRORS
    # No fallback, because it would silently continue without the GPU.
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
