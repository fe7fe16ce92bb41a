"""Trains a run: the worker's side. The network itself only lives in a child process."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from artifacts.catalogue import BackboneName
from artifacts.images import ImageLimits
from artifacts.store import Digest, Store
from models import comparison as comparisons
from models import registry
from models import run as runs
from models.dataset import DatasetVersion
from models.job import Queue, owe
from models.project import Principal
from models.reference import collect
from models.registry import Backbone, Weights
from models.run import EventKind, Fold, Run, RunState
from worker.loop import Complete, Work
from worker.process import Child, Died, Message
from worker.weights import Source

_WRITE_EVERY_S = 1.0


@dataclass(frozen=True)
class TrainingPlace:
    """Where training happens, as its child process is told."""

    features: str
    pixels: str
    pixels_bytes: int
    image_limits: ImageLimits
    threads: int
    source: Source


class Train:
    """The job that trains a run and adds what came out as a model version."""

    def __init__(self, store: Store, place: TrainingPlace) -> None:
        self._store = store
        self._place = place

    def run(self, work: Work) -> Complete:
        """Train in a child process; return what closes the run."""
        order = work.write(lambda session: self._start(session, work.subject_id))
        outcome: Message | None = None
        notes = _Notes(work)
        try:
            with Child(order, _devices(work.queue)) as child:
                while (message := child.receive(work)) is not None:
                    match message["type"]:
                        case "alive":
                            pass  # heard, and that is all
                        case "progress" | "epoch" | "fold":
                            notes.take(message)
                        case "file":
                            work.write(partial(_add_file, run_id=work.subject_id, file=message["file"]))
                        case "outcome":
                            outcome = message
                        case _:
                            child.send(work.write(partial(self._answer, asked=message)))
        except Died as death:
            raise death.as_failure() from death
        notes.write()
        if outcome is None:
            raise RuntimeError("The child ended without an outcome.")
        done = outcome
        return lambda session: _complete(session, work.subject_id, done)

    def requeued(self, session: Session, subject_id: str) -> None:
        runs.requeue_run(session, subject_id)

    def failed(self, session: Session, subject_id: str, error: dict[str, Any]) -> None:
        runs.fail_run(session, subject_id, error)
        _end(session, subject_id)

    def cancelled(self, session: Session, subject_id: str) -> None:
        runs.cancel_run(session, subject_id)
        _end(session, subject_id)

    def _start(self, session: Session, run_id: str) -> dict[str, Any]:
        run = session.get_one(Run, run_id)
        if run.state is not RunState.RUNNING:  # else an earlier try was written, and nobody heard so
            runs.start_run(session, run_id)
            comparisons.note_start(session, run_id)
            owe(session, run_id, "started", {})
        version = session.get_one(DatasetVersion, run.dataset_version_id)
        weights = registry.find_weights(session, BackboneName(run.recipe["backbone"]), run.recipe["weights"])
        return {
            "kind": "train",
            "store": str(self._store.root),
            "features": self._place.features,
            "pixels": self._place.pixels,
            "pixels_bytes": self._place.pixels_bytes,
            "image_limits": asdict(self._place.image_limits),
            "threads": self._place.threads,
            "source": asdict(self._place.source),
            "recipe": run.recipe,
            "manifest": version.manifest_sha256,
            "labels": [count.name for count in version.class_counts],
            "weights": weights.sha256 if weights else None,
        }

    def _answer(self, session: Session, asked: Message) -> dict[str, Any]:
        """Answer what the child wants to know, or note what it found, in one transaction."""
        match asked["type"]:
            case "weights":
                weights = Weights(
                    network=BackboneName(asked["network"]),
                    name=asked["name"],
                    sha256=asked["sha256"],
                    source=asked["source"],
                )
                registry.set_weights(session, weights)
                return {}
            case "find_backbone":
                found = registry.find_backbone(session, **_key(asked))
                return {"digest": found.sha256 if found else None}
            case "add_backbone":
                key = asked["key"]
                backbone = Backbone(
                    sha256=asked["digest"],
                    network=BackboneName(key["network"]),
                    weights_sha256=key["weights"],
                    cut=key["cut"],
                    size=key["size"],
                    export_version=key["export_version"],
                    manifest=asked["facts"],
                )
                digest = Digest(registry.add_backbone(session, backbone).sha256)
                if digest != asked["digest"]:  # another run was quicker
                    collect(session, self._store, [Digest(asked["digest"])])
                return {"digest": digest}
            case unknown:
                raise RuntimeError(f"The child asked {unknown!r}, which nobody answers. This is a bug.")


class _Notes:
    """Events on their way into the database, written together once a second: a fast head has many epochs in one."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._events: list[tuple[EventKind, dict[str, Any]]] = []
        self._folds: list[dict[str, Any]] = []
        self._progress: dict[str, Any] | None = None
        self._written_at = time.monotonic()

    def take(self, message: Message) -> None:
        match message["type"]:
            case "progress":
                self._progress = runs.progress(**message["state"])
            case "epoch":
                payload = {name: message[name] for name in ("fold", "epoch", "metrics")}
                self._events.append((EventKind.EPOCH, payload))
            case "fold":
                self._folds.append(message["result"])
        if self._folds or time.monotonic() - self._written_at >= _WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write what was noted."""
        found: list[int] = []

        def change(session: Session) -> None:
            """Write it once: only the lease's holder adds events, so that more of them mean an earlier try's."""
            found.append(runs.last_event(session, self._work.subject_id))
            if found[-1] == found[0]:
                self._write(session)

        self._work.write(change)
        self._events, self._folds, self._progress = [], [], None
        self._written_at = time.monotonic()

    def _write(self, session: Session) -> None:
        run_id = self._work.subject_id
        for kind, payload in self._events:
            runs.add_event(session, run_id, kind, payload)
        for result in self._folds:
            runs.add_fold(session, Fold(run_id=run_id, **result))
            owe(session, run_id, "fold", {"fold": result["number"]})
        if self._progress is not None:
            runs.set_progress(session, run_id, self._progress)


def _devices(queue: Queue) -> dict[str, str]:
    """Let a job of the queue `gpu` see one GPU, whose memory it takes as it needs it, and any other job none."""
    if queue is not Queue.GPU:
        return {"CUDA_VISIBLE_DEVICES": "-1"}
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {"CUDA_VISIBLE_DEVICES": mine, "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def _key(asked: Message) -> dict[str, Any]:
    key = dict(asked["key"])
    return {**key, "network": BackboneName(key["network"]), "weights": Digest(key["weights"])}


def _complete(session: Session, run_id: str, outcome: Message) -> None:
    """Close the run with its model version, in one transaction."""
    run: Run = runs.succeed_run(session, run_id, outcome["metrics"], outcome["extraction"])
    for file in outcome["files"]:
        _add_file(session, run_id, file)
    registry.add_model_version(
        session,
        Principal(run.project_id),
        run.name,
        run_id,
        Digest(outcome["bundle"]),
        Digest(outcome["backbone"]),
    )
    _end(session, run_id)


def _end(session: Session, run_id: str) -> None:
    """Owe what the end of a run makes due."""
    owe(session, run_id, "finished", {})
    comparisons.note_end(session, run_id)


def _add_file(session: Session, run_id: str, file: dict[str, Any]) -> None:
    runs.add_artifact(session, run_id, file["name"], Digest(file["sha256"]), file["size_bytes"], file["media_type"])
