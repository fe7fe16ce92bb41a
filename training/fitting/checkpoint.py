"""Checkpoints: the state that an interrupted fit continues from, as one safetensors file. They never contain code.

A checkpoint is valid for one part of one run, its data, its weights and the code that wrote it. Its mark is a hash of
all these; `load` ignores a file with another mark.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy.typing as npt

from artifacts import tensors
from artifacts.tensors import UNREADABLE, Tensors
from recipes.layers import Activation
from training.fitting.head_fit import FittedHead, Scaler, dense_layers
from training.fitting.training_loop import Arrays, EarlyStoppingState, FitSummary, Snapshot

# Raise it whenever the computation of a training or the contents of a checkpoint change.
VERSION = 4


@dataclass(frozen=True)
class Checkpoint:
    """The state of an unfinished fit.

    Attributes:
        head: the trained head on frozen features; None while it is being trained.
        snapshot: of the head while it is trained, then of the network; None before the network's first epoch has ended.
        seconds: training time so far, over all attempts; the writer of the checkpoint sets it.
    """

    head: FittedHead | None
    snapshot: Snapshot | None
    seconds: float = 0.0


def mark(belongs: Mapping[str, Any]) -> str:
    """Return the mark of checkpoints for these values, which JSON must be able to hold."""
    what = json.dumps([VERSION, keras.__version__, belongs], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def dump(checkpoint: Checkpoint, mark: str) -> bytes:
    """Return the bytes of a checkpoint file."""
    arrays: Tensors = {}
    values: dict[str, Any] = {"mark": mark, "seconds": checkpoint.seconds}
    if checkpoint.head is not None:
        values["head"] = _dump_fit(checkpoint.head, arrays)
    if checkpoint.snapshot is not None:
        values["snapshot"] = _dump_snapshot(checkpoint.snapshot, arrays)
    return tensors.dump(values, arrays)


def load(data: bytes, mark: str) -> Checkpoint | None:
    """Return the checkpoint in a file; None if the file is damaged or has another mark."""
    try:
        values, arrays = tensors.load(data)
        if values["mark"] != mark:
            return None
        return Checkpoint(
            _load_fit(values["head"], arrays) if "head" in values else None,
            _load_snapshot(values["snapshot"], arrays) if "snapshot" in values else None,
            values["seconds"],
        )
    except UNREADABLE:
        return None


def _dump_snapshot(snapshot: Snapshot, arrays: Tensors) -> dict[str, Any]:
    _put(arrays, "variables", snapshot.variables)
    _put(arrays, "optimizer", snapshot.optimizer)
    values: dict[str, Any] = {"history": snapshot.history}
    if snapshot.early_stopping_state is not None:
        _put(arrays, "watched", snapshot.early_stopping_state.weights)
        values["watched"] = {
            name: getattr(snapshot.early_stopping_state, name) for name in ("best", "best_epoch", "wait")
        }
    return values


def _load_snapshot(values: Mapping[str, Any], arrays: Tensors) -> Snapshot:
    early_stopping_state = (
        EarlyStoppingState(**values["watched"], weights=_all(arrays, "watched")) if "watched" in values else None
    )
    return Snapshot(values["history"], _all(arrays, "variables"), _all(arrays, "optimizer"), early_stopping_state)


def _dump_fit(fit: FittedHead, arrays: Tensors) -> dict[str, Any]:
    _put(arrays, "head", fit.weights)
    for name, scaler in (("scaler", fit.scaler), ("unit", fit.target_scaler)):
        if scaler is not None:
            arrays |= {f"{name}.mean": scaler.mean, f"{name}.scale": scaler.scale}
    return {"activation": fit.layers[0].activation, "trained": asdict(fit.trained)}


def _load_fit(values: Mapping[str, Any], arrays: Tensors) -> FittedHead:
    weights = _all(arrays, "head")
    scaler = Scaler(arrays["scaler.mean"], arrays["scaler.scale"])
    target_scaler = Scaler(arrays["unit.mean"], arrays["unit.scale"]) if "unit.mean" in arrays else None
    layers = dense_layers(weights, Activation(values["activation"]), scaler, target_scaler)
    return FittedHead(layers, scaler, target_scaler, weights, FitSummary(**values["trained"]))


def _put(arrays: Tensors, name: str, put: Iterable[npt.NDArray[Any]]) -> None:
    arrays |= {f"{name}.{number}": array for number, array in enumerate(put)}


def _all(arrays: Tensors, name: str) -> Arrays:
    count = sum(key.startswith(f"{name}.") and key.removeprefix(f"{name}.").isdigit() for key in arrays)
    return [arrays[f"{name}.{number}"] for number in range(count)]
