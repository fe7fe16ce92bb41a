"""Reads and writes checkpoints: the state from which an interrupted fit continues, as a safetensors file without code.

A checkpoint is only valid for the same part of the same run, with the same data, weights and code. Its mark is a hash
of all these values, and `load` ignores a file with another mark.
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

# Increase this number whenever a change of the code alters how a training computes, or what a checkpoint contains.
VERSION = 4


@dataclass(frozen=True)
class Checkpoint:
    """The state of an unfinished fit at the end of an epoch.

    Fine-tuning has two phases: it fits a head on frozen features, then trains the network. All other fits have one.

    Attributes:
        head: the finished head of the first phase of fine-tuning; None during the first phase, and in fits with one
            phase.
        snapshot: the weights and optimizer state of the current phase; None between the two phases of fine-tuning.
        seconds: training time so far, over all attempts. The writer of the checkpoint fills this in.
    """

    head: FittedHead | None
    snapshot: Snapshot | None
    seconds: float = 0.0


def mark(belongs: Mapping[str, Any]) -> str:
    """Return the mark of checkpoints that belong to these JSON values, such as the run, its part and its data."""
    what = json.dumps([VERSION, keras.__version__, belongs], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def dump(checkpoint: Checkpoint, mark: str) -> bytes:
    """Return a checkpoint with its mark as the bytes of a safetensors file."""
    arrays: Tensors = {}
    values: dict[str, Any] = {"mark": mark, "seconds": checkpoint.seconds}
    if checkpoint.head is not None:
        values["head"] = _dump_fit(checkpoint.head, arrays)
    if checkpoint.snapshot is not None:
        values["snapshot"] = _dump_snapshot(checkpoint.snapshot, arrays)
    return tensors.dump(values, arrays)


def load(data: bytes, mark: str) -> Checkpoint | None:
    """Return the checkpoint in the bytes of a file. Return None if they are damaged or have another mark."""
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
