"""Runs an exported backbone by ONNX Runtime, on an NVIDIA GPU where there is one. Knows no heads, batching or settings.

Importing this needs a package that the service starts without: `inference.engine_choice` does so when it is wanted.
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

# An int8 network holds its rounding itself; bfloat16 would be a choice of the engine, which has none.
_HONOURED = (Precision.FLOAT32, Precision.INT8)
_ONLY_ERRORS = 3
# What it says when the GPU or the machine has no room; it has no error of its own for that.
_NO_ROOM = ("failed to allocate memory", "out of memory", "alloc_failed", "bad_alloc")
# A network of one addition, x + x of two numbers, as ONNX 1.x writes it.
_ADDITION = bytes.fromhex(
    "08083a3c0a0e0a01780a0178120179220341646412086164646974696f6e5a0f0a0178120a0a08080112040a02080262"
    "0f0a0179120a0a08080112040a02080242040a00100d"
)


def provider_options(has_cuda: bool) -> list[Provider]:
    """Return what runs a network, in the order of preference, and how."""
    processor: Provider = (PROCESSOR, {})
    if not has_cuda:
        return [processor]
    options = {
        # TensorFloat-32 has 10 bits of mantissa and is on by default: a score of float32 would not be reproduced.
        "use_tf32": "0",
        # The default tries every algorithm at the first batch of each size, which takes seconds.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The default doubles what it takes, and several networks share the GPU.
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [(CUDA, options), processor]


@cache
def finds_cuda() -> bool:
    """Return whether a network runs on a GPU here: tried once, with one addition."""
    if CUDA not in onnxruntime.get_available_providers():
        return False
    onnxruntime.preload_dlls()  # CUDA's libraries as packages of Python, which no loader would find
    try:
        return runs_on(CUDA, provider_options(has_cuda=True))
    except Exception:  # no driver, no device, one that is too old: each comes as an error of its own
        return False


def runs_on(wanted: str, providers: Sequence[Provider]) -> bool:
    """Return whether one addition comes out right with these providers, `wanted` being the first that is in use."""
    session = _session(_ADDITION, 1, providers)
    [found] = session.run(None, {"x": np.array([1, 2], np.float32)})
    return bool(session.get_providers()[0] == wanted and found.tolist() == [2, 4])


class OnnxEngine:
    """An ONNX network run by ONNX Runtime: on the GPU if there is one, else on the processor."""

    name = "onnxruntime"

    def __init__(self, network: Path, precision: Precision, threads: int) -> None:
        """Load a network. Raises PrecisionUnsupported for one that it would not keep, and OutOfMemory."""
        if precision not in _HONOURED:
            raise PrecisionUnsupported(
                f"The engine onnxruntime computes in {' or '.join(_HONOURED)}. Received a model of precision "
                f"{precision}: serve it with ESPALIER_ENGINE=openvino."
            )
        with _out_of_memory_errors("the network"):
            self._session = _session(str(network), threads, provider_options(finds_cuda()))
        [given] = self._session.get_inputs()
        self._input = given.name

    def features(self, images: Pixels) -> Features:
        """Return float32 [N, D] for uint8 images [N, H, W, 3]."""
        return self.run(images, wants_maps=False)[0]

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return the features and, if asked, the maps that they are the mean of, float32 [N, h, w, D].

        Raises OutOfMemory if there is no room for so many images.
        """
        outputs = ["features", "maps"] if wants_maps else ["features"]
        with _out_of_memory_errors(f"a batch of {len(images)} images"):
            features, *maps = self._session.run(outputs, {self._input: np.ascontiguousarray(images)})
        return features, maps[0] if maps else None


def _session(network: str | bytes, threads: int, providers: Sequence[Provider]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait for work in a loop take the processor from those that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _ONLY_ERRORS
    # Its own fallback would go on without the GPU, with a line on standard output.
    return onnxruntime.InferenceSession(network, options, providers=list(providers), enable_fallback=0)


@contextlib.contextmanager
def _out_of_memory_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not any(words in str(error).lower() for words in _NO_ROOM):
            raise
        where = "on the GPU" if finds_cuda() else "in memory"
        raise OutOfMemory(
            f"There is no room {where} for {what}. Keep fewer networks loaded (ESPALIER_SHELF_BYTES), or let nothing "
            "else run there."
        ) from error
