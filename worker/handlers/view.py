"""Handles the job `view`: starts the child process that computes a view of a finished run, and stores the result.

The child (`worker.child.view`) reads the stored files of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

from sqlalchemy.orm import Session

from artifacts.images import ImageLimits
from artifacts.run_files import RunFile
from artifacts.store import Digest, Store
from errors import EspalierError
from models import registry
from models import run as runs
from models import view as views
from models.dataset import DatasetVersion
from models.file_references import delete_unreferenced_after_commit, lock_files
from models.job import Job
from models.outbox import add_to_outbox
from models.run import Run
from models.view import View, ViewKind
from worker.child_process import Child, ChildConnection, ChildDied, computing_threads, messages, store_keys
from worker.lease import Complete, Handler, Work
from worker.messages import ActivationsOrder, LayersOrder, LearningCurveOrder, ViewOrder, ViewOutcome, ViewProgress

StartChild = Callable[[ViewOrder, Mapping[str, str]], AbstractContextManager[ChildConnection]]


class ComputeView(Handler):
    """Computes one view of a finished run in a child process, such as its learning curve."""

    def __init__(
        self, store: Store, features: str, image_limits: ImageLimits, threads: int, start: StartChild = Child
    ) -> None:
        self._store = store
        self._features = features
        self._image_limits = image_limits
        self._threads = threads
        self._start = start

    def run(self, work: Work) -> Complete:
        """Compute the view in a child process; return the function that records the result."""
        order = work.write(lambda session: self._begin(session, work.subject_id))
        if order is None:  # the view was given up, for example because its data set was deleted
            return lambda session: None
        outcome: ViewOutcome | None = None
        # The child gets no GPU: GPUs are for fine-tuning, and a head trains as fast on the processor.
        surroundings = {"CUDA_VISIBLE_DEVICES": "-1", **computing_threads(self._threads), **store_keys(self._store)}
        try:
            with self._start(order, surroundings) as child:
                for message in messages(child, work):
                    match message:
                        case ViewOutcome():
                            outcome = message
                        case ViewProgress(fraction=fraction, eta_s=eta_s):
                            progress = {"fraction": fraction, "eta_s": eta_s}
                            work.write(partial(views.set_progress, view_id=work.subject_id, progress=progress))
        except ChildDied as death:
            raise death.as_failure() from death
        if outcome is None:
            raise RuntimeError("The child ended without an outcome. This is a bug.")
        computed = outcome
        files = [computed.file] if computed.picture is None else [computed.file, computed.picture]
        contents = {digest: self._store.read(digest) for digest in files}
        return lambda session: self._complete(session, work.subject_id, computed, contents)

    def requeued(self, session: Session, job: Job, error: EspalierError | None) -> None:
        views.requeue_view(session, job.subject_id)

    def failed(self, session: Session, job: Job, error: EspalierError) -> None:
        views.fail_view(session, job.subject_id, error.record())

    def cancelled(self, session: Session, job: Job) -> None:
        views.cancel_view(session, job.subject_id)

    def _begin(self, session: Session, view_id: str) -> ViewOrder | None:
        """Mark the view as running; return the order for the child, or None if nobody needs the view any more."""
        view = views.start_view(session, view_id)
        if view is None:
            return None
        return self._order(session, view, session.get_one(Run, view.run_id))

    def _order(self, session: Session, view: View, run: Run) -> ViewOrder:
        store, threads, limits, bundle = (
            self._store.address,
            self._threads,
            self._image_limits,
            _bundle_of(session, run),
        )
        match view.kind:
            case ViewKind.LAYERS:
                return LayersOrder(store=store, threads=threads, image_limits=limits, bundle=bundle)
            case ViewKind.ACTIVATIONS:
                image, layer = views.image_and_layer(view)
                return ActivationsOrder(
                    store=store, threads=threads, image_limits=limits, bundle=bundle, image=Digest(image), layer=layer
                )
            case ViewKind.LEARNING_CURVE:
                dataset = session.get_one(DatasetVersion, run.dataset_version_id)
                assert dataset.manifest_sha256 is not None, "Runs train on a version that is ready. This is a bug."
                files = {file.name: file.sha256 for file in runs.get_artifacts(session, run.id)}
                return LearningCurveOrder(
                    store=store,
                    threads=threads,
                    image_limits=limits,
                    bundle=bundle,
                    features=self._features,
                    recipe=run.recipe if run.batch_size is None else {**run.recipe, "batch_size": run.batch_size},
                    manifest=Digest(dataset.manifest_sha256),
                    labels=tuple(count.name for count in dataset.class_counts),
                    out_of_fold=Digest(files[RunFile.OUT_OF_FOLD]),
                )

    def _complete(self, session: Session, view_id: str, outcome: ViewOutcome, contents: Mapping[Digest, bytes]) -> None:
        """Record the computed files, or delete them if nobody needs the view any more."""
        lock_files(session)
        for missing in self._store.missing(
            contents
        ):  # the files were deleted meanwhile, together with an identical view
            self._store.put(contents[missing])
        view = views.succeed_view(session, view_id, outcome.file, len(contents[outcome.file]))
        if view is None:
            delete_unreferenced_after_commit(session, self._store, list(contents))
        elif outcome.picture is not None:
            name, picture = RunFile.LEARNING_CURVE.value, outcome.picture
            runs.add_artifact(session, view.run_id, name, picture, len(contents[picture]), "image/png")
            add_to_outbox(session, view.run_id, "file", {"name": name})


def _bundle_of(session: Session, run: Run) -> Digest:
    """Return the digest of the bundle that a run made. The bundle names the network and how to decode images for it."""
    version = registry.find_run_version(session, run.id)
    assert version is not None, "A succeeded run has no model version. This is a bug."
    return Digest(version.bundle_sha256)
