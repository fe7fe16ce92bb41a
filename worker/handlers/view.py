"""Computes what is asked of a finished run: the worker's side. The child reads what the run left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from artifacts.images import ImageLimits
from artifacts.store import Digest, Store
from errors import EspalierError
from models import registry
from models import run as runs
from models import view as views
from models.dataset import DatasetVersion
from models.file_references import delete_unreferenced_after_commit, lock_files
from models.job import Job
from models.outbox import owe
from models.run import Run
from models.view import CURVE_PICTURE, View, ViewKind
from worker.child_process import Child, Died, Message, Talking, computing_threads, store_keys
from worker.handlers.compare import OUT_OF_FOLD
from worker.lease import Complete, Handler, Work

Start = Callable[[Mapping[str, Any], Mapping[str, str]], AbstractContextManager[Talking]]


class Look(Handler):
    """The job that makes one view of a run."""

    def __init__(
        self, store: Store, features: str, image_limits: ImageLimits, threads: int, start: Start = Child
    ) -> None:
        self._store = store
        self._features = features
        self._image_limits = image_limits
        self._threads = threads
        self._start = start

    def run(self, work: Work) -> Complete:
        """Compute in a child process; return what keeps the result."""
        order = work.write(lambda session: self._begin(session, work.subject_id))
        if order is None:  # the data set was deleted meanwhile
            return lambda session: None
        outcome: Message | None = None
        # No GPU: it belongs to the trainings, and a head is as quick without.
        surroundings = {"CUDA_VISIBLE_DEVICES": "-1", **computing_threads(self._threads), **store_keys(self._store)}
        try:
            with self._start(order, surroundings) as child:
                while (message := child.receive(work)) is not None:
                    match message["type"]:
                        case "outcome":
                            outcome = message
                        case "progress":
                            tell = partial(views.set_progress, view_id=work.subject_id, progress=message["state"])
                            work.write(tell)
        except Died as death:
            raise death.as_failure() from death
        if outcome is None:
            raise RuntimeError("The child ended without an outcome. This is a bug.")
        files: dict[str, Digest] = {name: Digest(outcome[name]) for name in ("file", "picture") if name in outcome}
        contents = {digest: self._store.read(digest) for digest in files.values()}
        return lambda session: self._complete(session, work.subject_id, files, contents)

    def requeued(self, session: Session, job: Job, error: EspalierError | None) -> None:
        views.requeue_view(session, job.subject_id)

    def failed(self, session: Session, job: Job, error: EspalierError) -> None:
        views.fail_view(session, job.subject_id, error.record())

    def cancelled(self, session: Session, job: Job) -> None:
        views.cancel_view(session, job.subject_id)

    def _begin(self, session: Session, view_id: str) -> dict[str, Any] | None:
        """Note that the view is worked on; return the order for the child, or None if nobody wants it any more."""
        view = views.start_view(session, view_id)
        if view is None:
            return None
        run = session.get_one(Run, view.run_id)
        return {
            "kind": "view",
            "what": view.kind.value,
            "store": asdict(self._store.address),
            "threads": self._threads,
            "image_limits": asdict(self._image_limits),
            "bundle": _bundle_of(session, run),
            **_more(session, self._features, run, view),
        }

    def _complete(
        self, session: Session, view_id: str, files: Mapping[str, Digest], contents: Mapping[Digest, bytes]
    ) -> None:
        """Name what was computed, unless nobody wants it any more."""
        lock_files(session)
        for missing in self._store.missing(contents):  # it was removed just now, with a view that was the same
            self._store.put(contents[missing])
        view = views.succeed_view(session, view_id, files["file"], len(contents[files["file"]]))
        if view is None:
            delete_unreferenced_after_commit(session, self._store, list(contents))
        elif "picture" in files:
            picture = files["picture"]
            runs.add_artifact(session, view.run_id, CURVE_PICTURE, picture, len(contents[picture]), "image/png")
            owe(session, view.run_id, "file", {"name": CURVE_PICTURE})


def _bundle_of(session: Session, run: Run) -> str:
    """Return the bundle that a run made: it names the network, and how images come to it."""
    version = registry.find_run_version(session, run.id)
    assert version is not None, "A run that has succeeded made a model version. This is a bug."
    return version.bundle_sha256


def _more(session: Session, features: str, run: Run, view: View) -> dict[str, Any]:
    """Return what a kind of view needs besides the bundle."""
    match view.kind:
        case ViewKind.LAYERS:
            return {}
        case ViewKind.ACTIVATIONS:
            image, layer = views.image_and_layer(view)
            return {"image": image, "layer": layer}
        case ViewKind.LEARNING_CURVE:
            dataset = session.get_one(DatasetVersion, run.dataset_version_id)
            files = {file.name: file.sha256 for file in runs.get_artifacts(session, run.id)}
            return {
                "features": features,
                "recipe": run.recipe if run.batch_size is None else {**run.recipe, "batch_size": run.batch_size},
                "manifest": dataset.manifest_sha256,
                "labels": [count.name for count in dataset.class_counts],
                "out_of_fold": files[OUT_OF_FOLD],
            }
