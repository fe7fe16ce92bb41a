"""Trains a run, a part at a time: the worker's side. The network itself lives in a child process only.

A child that has done one part of a run is kept for the next one, which needs the same data and the same network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

from sqlalchemy.orm import Session

import environments
from artifacts.images import ImageLimits
from artifacts.store import Digest, Store
from errors import Crashed, DiskFull, EspalierError, StoreUnavailable
from models import comparison as comparisons
from models import job as jobs
from models import registry, run_jobs
from models import run as runs
from models.dataset import DatasetVersion
from models.file_references import delete_unreferenced_after_commit, lock_files
from models.job import Job, JobKind, Queue
from models.outbox import add_to_outbox
from models.project import Principal
from models.registry import Backbone, Weights
from models.run import FINAL_PART, EventKind, Fold, Run
from recipes.catalogue import BackboneName
from recipes.recipe import AUTO, Mode
from training.progress import Extraction
from worker.child_process import Child, ChildConnection, ChildDied, ChildEnded, computing_threads, store_keys
from worker.lease import Complete, Handler, Reason, Stopped, Work
from worker.messages import (
    AddBackbone,
    AddQuantised,
    Alive,
    Answer,
    CheckpointWritten,
    ChildMessage,
    ChoiceAnswer,
    DigestAnswer,
    EpochEnded,
    Extracted,
    FileWritten,
    FindBackbone,
    FindFeaturesChoice,
    FindPrecisionChoice,
    FindQuantised,
    FoldEnded,
    JobProgress,
    Prepared,
    Progress,
    RunOutcome,
    SetFeaturesChoice,
    SetPrecisionChoice,
    Stored,
    StoredFile,
    TrainingSpec,
    TrainOrder,
    TrainPart,
    WeightsObtained,
    WeightsSource,
)
from worker.run_progress import ProgressEstimator

_WRITE_EVERY_S = 0.5
DRAIN_WITHIN_S = 12.0


PartEnd = Prepared | FoldEnded | RunOutcome
MessageT = TypeVar("MessageT")


@dataclass(frozen=True)
class TrainingSettings:
    """What the settings say of training: folders, limits, threads; checkpoints may take `checkpoint_share` of the time.

    `features` and `pixels` are folders of caches, the latter of about `pixels_bytes` at most.
    """

    features: str
    pixels: str
    pixels_bytes: int
    image_limits: ImageLimits
    threads: int
    source: WeightsSource
    checkpoint_share: float


def _start(environment: Mapping[str, str]) -> Child:
    return Child(environment=environment)


class Train(Handler):
    """The jobs that train a run and add what came out as a model version: train, fold and final."""

    def __init__(
        self,
        store: Store,
        place: TrainingSettings,
        start: Callable[[Mapping[str, str]], ChildConnection] = _start,
        drain_within_s: float = DRAIN_WITHIN_S,
    ) -> None:
        self._store = store
        self._drain_within_s = drain_within_s
        self._place = place
        self._start = start

    def run(self, work: Work) -> Complete:
        """Train in a child process; return what writes the end of the job."""
        order = work.write(lambda session: self._make_order(session, work.job))
        if order is None:  # the run was closed meanwhile
            return lambda session: None
        child = work.warm_child.take(work.subject_id) or self._start(self._surroundings(work.job.queue))
        writer = ProgressWriter(work, child, self._store, _LAST[order.part])
        try:
            child.send(order)
            end = writer.write_until_end()
        except BaseException as error:
            is_draining = isinstance(error, Stopped) and error.reason is Reason.DRAINING
            late_end = writer.drain(self._drain_within_s) if is_draining else None
            child.stop()
            if isinstance(error, ChildDied):
                raise error.as_failure() from error
            if late_end is None:
                raise
            return writer.closing(partial(self._complete, job=work.job, end=late_end))
        if order.part in (TrainPart.ALL, TrainPart.FINAL):
            child.stop()
        else:
            work.warm_child.keep(work.subject_id, child)
        return partial(self._complete, job=work.job, end=end)

    def requeued(self, session: Session, job: Job, error: EspalierError | None) -> None:
        match error:
            case DiskFull():
                stage = "waiting-for-disk"
            case StoreUnavailable():
                stage = "waiting-for-store"
            case _:
                stage = "queued"
        run_jobs.mark_interrupted(session, job, stage)

    def failed(self, session: Session, job: Job, error: EspalierError) -> None:
        if run_jobs.mark_failed(session, job, error.record()):
            comparisons.on_run_ended(session, job.subject_id)

    def ease(self, session: Session, job: Job) -> bool:
        """Restart the run with half the batch size; return False if it was restarted before."""
        useless = run_jobs.restart_with_half_batch(session, job)
        if useless is None:
            return False
        delete_unreferenced_after_commit(session, self._store, useless)
        return True

    def cancelled(self, session: Session, job: Job) -> None:
        if run_jobs.mark_cancelled(session, job):
            comparisons.on_run_ended(session, job.subject_id)
            delete_unreferenced_after_commit(session, self._store, run_jobs.drop_leftovers(session, job.subject_id))

    # --- before -----------------------------------------------------------------------------------------------------

    def _surroundings(self, queue: Queue) -> dict[str, str]:
        """Return the environment of a child: set here, since the child may need TensorFlow before its first order."""
        devices = _devices(queue) | computing_threads(self._place.threads)
        return devices | environments.proxies() | store_keys(self._store)

    def _make_order(self, session: Session, job: Job) -> TrainOrder | None:
        """Note that a part is worked on; return the order for the child, or None if there is nothing to do."""
        run = run_jobs.mark_started(session, job)
        if run is None:
            return None
        comparisons.on_run_started(session, run.id)
        checkpoints = {
            part: tuple(map(Digest, digests)) for part, digests in runs.get_checkpoints(session, run.id).items()
        }
        final_checkpoints = checkpoints.pop(FINAL_PART, ())
        spec = self._spec(session, run)
        return TrainOrder(
            part=_part(job, run),
            fold=job.index,
            outcomes={
                fold.number: Digest(fold.outcome_sha256)
                for fold in runs.get_folds(session, run.id)
                if fold.outcome_sha256 is not None
            },
            checkpoints=checkpoints,
            final_checkpoints=final_checkpoints,
            checkpoint_share=self._place.checkpoint_share,
            extraction=Extraction(**run.extraction) if run.extraction else None,
            spec=spec,
        )

    def _spec(self, session: Session, run: Run) -> TrainingSpec:
        """Return what the child needs to know for every part of a run; name the weights that it begins with."""
        version = session.get_one(DatasetVersion, run.dataset_version_id)
        assert version.manifest_sha256 is not None, "Runs train on a version that is ready. This is a bug."
        backbone, candidates = run.recipe["backbone"], {}
        if run.weights_sha256 is None and backbone == AUTO:
            rows = registry.find_weights_by_name(session, run.recipe["weights"])
            candidates = {row.network: Digest(row.sha256) for row in rows}
        elif run.weights_sha256 is None and backbone is not None:
            known = registry.find_weights(session, BackboneName(backbone), run.recipe["weights"])
            run.weights_sha256 = known.sha256 if known else None
        return TrainingSpec(
            run=run.id,
            store=self._store.address,
            features=self._place.features,
            pixels=self._place.pixels,
            pixels_bytes=self._place.pixels_bytes,
            image_limits=self._place.image_limits,
            threads=self._place.threads,
            source=self._place.source,
            recipe=run.recipe if run.batch_size is None else {**run.recipe, "batch_size": run.batch_size},
            manifest=Digest(version.manifest_sha256),
            labels=tuple(count.name for count in version.class_counts),
            weights=Digest(run.weights_sha256) if run.weights_sha256 else None,
            candidates=candidates,
        )

    # --- after ------------------------------------------------------------------------------------------------------

    def _complete(self, session: Session, job: Job, end: PartEnd) -> None:
        """Write what a part leaves, in the transaction that closes its job."""
        match end:
            case Prepared():
                run_jobs.queue_folds(session, job)
            case FoldEnded():
                self._end_fold(session, job, end)
            case RunOutcome():
                self._end_run(session, job, end)
        if jobs.is_cancel_requested(session, job.id):  # requested at the last moment: none of the new jobs may start
            self.cancelled(session, job)

    def _end_fold(self, session: Session, job: Job, end: FoldEnded) -> None:
        if run_jobs.lock_active_run(session, job) is None:
            delete_unreferenced_after_commit(session, self._store, [end.outcome])
            return
        run_jobs.finish_fold(session, job, _fold(job.subject_id, end))
        _note_fold(session, self._store, job.subject_id, end.result.number)

    def _end_run(self, session: Session, job: Job, end: RunOutcome) -> None:
        """Close the run with its model version."""
        run = run_jobs.mark_succeeded(session, job, end.metrics, end.training_s)
        if run is None:
            delete_unreferenced_after_commit(
                session, self._store, [end.bundle, end.backbone, *(file.sha256 for file in end.files)]
            )
            return
        for file in end.files:
            _add_file(session, run.id, file)
        registry.add_model_version(
            session,
            Principal(run.project_id),
            run.name,
            run.id,
            end.bundle,
            end.backbone,
            can_be_champion=end.metrics.get("baseline", {}).get("is_better", True),
        )
        comparisons.on_run_ended(session, run.id)
        delete_unreferenced_after_commit(session, self._store, run_jobs.drop_leftovers(session, run.id))


# The message that ends each part.
_LAST: Mapping[TrainPart, type[PartEnd]] = {
    TrainPart.PREPARE: Prepared,
    TrainPart.FOLD: FoldEnded,
    TrainPart.FINAL: RunOutcome,
    TrainPart.ALL: RunOutcome,
}


def _part(job: Job, run: Run) -> TrainPart:
    """Return how much of a run a job covers."""
    match job.kind:
        case JobKind.FOLD:
            return TrainPart.FOLD
        case JobKind.FINAL:
            return TrainPart.FINAL
        case _:
            return TrainPart.PREPARE if run_jobs.has_fold_jobs(run) else TrainPart.ALL


# Messages that become rows. Those of the second tuple are written at once: others continue from them, or look at them.
_ROWS = (Progress, EpochEnded, FoldEnded, CheckpointWritten, Extracted, FileWritten)
_ROWS_AT_ONCE = (FoldEnded, CheckpointWritten, Extracted, FileWritten)


class ProgressWriter:
    """Writes what a child reports about a part of a run into the database.

    Rows are written together, a few times a second at most: a fast head has many epochs in one second.
    """

    def __init__(self, work: Work, child: ChildConnection, store: Store, last: type[PartEnd]) -> None:
        """Write for a job; `last` is the message that ends its part."""
        self._work = work
        self._child = child
        self._store = store
        self._last = last
        self._writes = 1
        self._written_at = work.clock.now()
        self._unwritten: list[ChildMessage] = []
        self._is_unsure = False

    def write_until_end(self) -> PartEnd:
        """Receive messages, write rows and answer questions until the part has ended; return the message of its end.

        Raises what `ChildConnection.receive` does; Crashed if the child ended before its part did.
        """
        while True:
            try:
                message = self._child.receive(self._work)
            except ChildEnded:
                raise Crashed("The process ended without a result. The worker's log has more.") from None
            is_end = isinstance(message, self._last)
            if not is_end and message is not None:
                if isinstance(message, Alive):
                    self._work.moved(message.step_s)
                    continue
                if not isinstance(message, _ROWS):
                    self._answer(message)
                    continue
                self._unwritten.append(message)
            if self._unwritten and (is_end or isinstance(message, _ROWS_AT_ONCE) or self._is_due):
                self._is_unsure = True
                self._work.write(self._write_rows)
                self._note_write()
            if is_end:
                assert isinstance(message, Prepared | FoldEnded | RunOutcome)
                return message

    def drain(self, within_s: float) -> PartEnd | None:
        """Have the child write its last checkpoints and end, and write the rows of that.

        If the part comes to its end meanwhile, return its last message and write nothing: `closing` writes everything
        together. If a lost answer leaves open what was written before, write and return None: the part is repeated.
        """
        end: PartEnd | None = None
        for message in self._child.drain(within_s):
            if isinstance(message, self._last):
                end = message
            elif isinstance(message, _ROWS):
                self._unwritten.append(message)
        if end is None or self._is_unsure:
            self._work.write_on_leaving(self._write_rows)
            return None
        return end

    def closing(self, complete: Complete) -> Complete:
        """Return a change that writes the rows that are left and then what closes the job, in one transaction."""

        def close(session: Session) -> None:
            self._write_rows(session)
            complete(session)

        return close

    @property
    def _is_due(self) -> bool:
        return self._work.clock.now() - self._written_at >= _WRITE_EVERY_S

    @property
    def _has_advanced(self) -> bool:
        """Whether something is to be written that a later attempt continues from."""
        return any(isinstance(message, FoldEnded | CheckpointWritten) for message in self._unwritten)

    def _answer(self, question: ChildMessage) -> None:
        answer = partial(_answer, run_id=self._work.subject_id, store=self._store, question=question)
        self._child.send(self._work.write(answer))

    def _note_write(self) -> None:
        self._is_unsure = False
        if self._has_advanced:
            self._work.job.attempt = 1
        self._unwritten.clear()
        self._writes += 1
        self._written_at = self._work.clock.now()

    def _write_rows(self, session: Session) -> None:
        """Write the rows once: where the answer to a commit was lost, the job's progress has its number already.

        Where a later attempt can continue from them, attempts are counted anew.
        """
        job = session.get_one(Job, self._work.lease.job_id)
        before = job.progress or {"writes": 0, "said": None}
        run = run_jobs.lock_active_run(session, job)
        if run is None or before["writes"] == self._writes:
            return
        for extracted in self._rows(Extracted):
            runs.record_extraction(session, run.id, asdict(extracted.extraction))
        for written in self._rows(FileWritten):
            _add_file(session, run.id, written.file)
        for epoch in self._rows(EpochEnded):
            runs.add_event(session, run.id, EventKind.EPOCH, epoch.model_dump(include={"fold", "epoch", "metrics"}))
        for ended in self._rows(FoldEnded):
            runs.add_fold(session, _fold(run.id, ended))
            _note_fold(session, self._store, run.id, ended.result.number)
        for checkpoint in self._rows(CheckpointWritten):
            _add_checkpoint(session, self._store, run.id, checkpoint)
        states = [progress.state for progress in self._rows(Progress)]
        job.progress = {"writes": self._writes, "said": states[-1].model_dump() if states else before["said"]}
        session.flush()
        if states:
            _set_progress(session, run)
        if self._has_advanced:
            job.attempt = 1

    def _rows(self, kind: type[MessageT]) -> list[MessageT]:
        return [message for message in self._unwritten if isinstance(message, kind)]


def _set_progress(session: Session, run: Run) -> None:
    """Write how far a run is, from what its jobs have noted and its folds took."""
    ended_s = [fold.seconds or 0.0 for fold in runs.get_folds(session, run.id)]
    noted = [progress["said"] for progress in run_jobs.get_progress(session, run)]
    states = [JobProgress.model_validate(state) for state in noted if state]
    progress = ProgressEstimator.of_run(Mode(run.recipe["mode"]), run_jobs.count_folds(run), ended_s, states)
    runs.set_progress(session, run.id, runs.progress(**progress))


def _answer(session: Session, run_id: str, store: Store, question: ChildMessage) -> Answer:
    """Answer a question of the child, after storing what it says."""
    match question:
        case WeightsObtained():
            weights = Weights(
                network=question.network, name=question.name, sha256=question.sha256, source=question.source
            )
            registry.set_weights(session, weights)
            run = session.get_one(Run, run_id)
            if not run.state.is_final:  # else nothing would ever drop them
                run.weights_sha256 = question.sha256
            return Stored()
        case FindBackbone():
            found = registry.find_backbone(
                session, question.network, question.weights, question.cut, question.size, question.export_version
            )
            return DigestAnswer(digest=Digest(found.sha256) if found else None)
        case AddBackbone():
            backbone = Backbone(
                sha256=question.digest,
                network=question.network,
                weights_sha256=question.weights,
                cut=question.cut,
                size=question.size,
                export_version=question.export_version,
                manifest=question.facts,
            )
            digest = Digest(registry.add_backbone(session, backbone).sha256)
            if digest != question.digest:  # another run was quicker
                delete_unreferenced_after_commit(session, store, [question.digest])
            return DigestAnswer(digest=digest)
        case FindQuantised() | AddQuantised():
            return DigestAnswer(digest=_settle_quantised(session, run_id, store, question))
        case FindFeaturesChoice():
            return ChoiceAnswer(choice=session.get_one(Run, run_id).features_choice)
        case SetFeaturesChoice():
            run = session.get_one(Run, run_id)
            if not run.state.is_final:
                run.features_choice, run.weights_sha256 = question.choice, question.weights
            return Stored()
        case FindPrecisionChoice():
            return ChoiceAnswer(choice=session.get_one(Run, run_id).precision_choice)
        case SetPrecisionChoice():
            run = session.get_one(Run, run_id)
            if not run.state.is_final:
                run.precision_choice = question.choice
            return Stored()
        case other:
            raise RuntimeError(f"Expected a question from the child of a training. Received {other!r}. This is a bug.")


def _settle_quantised(
    session: Session, run_id: str, store: Store, question: FindQuantised | AddQuantised
) -> Digest | None:
    """Return the quantised network that a run is to use, the same for all its parts, or None if it is to make one."""
    run = runs.lock_run(session, run_id)
    settled = Digest(run.quantised_sha256) if run.quantised_sha256 else None
    is_anew = bool(run.recipe.get("recalibrate"))
    backbone, image_rule = question.backbone, question.image_rule
    lock_files(session)  # nobody collects what is about to be named
    if isinstance(question, AddQuantised):
        made = question.digest
        if settled is None:
            newest = registry.find_quantised_backbone(session, backbone, image_rule)
            is_anew = is_anew or (newest is not None and not store.has(Digest(newest.sha256)))
            made_on = question.facts | {"dataset_version": run.dataset_version_id}
            row = registry.add_quantised_backbone(session, backbone, image_rule, made, made_on, is_anew=is_anew)
            settled = Digest(row.sha256)
        if settled != made:  # another run, or another part of this one, was quicker
            delete_unreferenced_after_commit(session, store, [made])
    elif settled is None and not is_anew:
        found = registry.find_quantised_backbone(session, backbone, image_rule)
        settled = Digest(found.sha256) if found and store.has(Digest(found.sha256)) else None
    if not run.state.is_final:
        run.quantised_sha256 = settled
    return settled


def _devices(queue: Queue) -> dict[str, str]:
    """Return the environment that shows one GPU to a job of the queue `gpu`, and none to any other."""
    if queue is not Queue.GPU:
        return {"CUDA_VISIBLE_DEVICES": "-1"}
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {"CUDA_VISIBLE_DEVICES": mine, "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def _fold(run_id: str, ended: FoldEnded) -> Fold:
    return Fold(run_id=run_id, outcome_sha256=ended.outcome, **asdict(ended.result))


def _note_fold(session: Session, store: Store, run_id: str, number: int) -> None:
    """Owe MLflow a fold that has ended, and drop its checkpoints."""
    add_to_outbox(session, run_id, "fold", {"fold": number})
    delete_unreferenced_after_commit(session, store, runs.drop_checkpoints(session, run_id, number))


def _add_checkpoint(session: Session, store: Store, run_id: str, written: CheckpointWritten) -> None:
    part = FINAL_PART if written.fold is None else written.fold
    useless = runs.add_checkpoint(session, run_id, part, written.epochs, written.sha256, written.size_bytes)
    delete_unreferenced_after_commit(session, store, useless)


def _add_file(session: Session, run_id: str, file: StoredFile) -> None:
    runs.add_artifact(session, run_id, file.name.value, file.sha256, file.size_bytes, file.media_type)
