"""Handles the jobs `train`, `fold` and `final`: each trains a run, or one part of it, in a child process.

After a part of a run, the child process is kept for the next part, which needs the same data and the same network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

from sqlalchemy.orm import Session

import environments
from artifacts.bit_depths import FULL_DEPTH
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
    """Settings for training that do not depend on the run.

    Attributes:
        features: folder of cached features.
        pixels: folder of cached pixels, of about `pixels_bytes` at most.
        image_limits: limits for decoding an image.
        threads: number of threads for each network.
        source: where ImageNet weights are downloaded from.
        checkpoint_share: fraction of the training time that writing checkpoints may take, from 0 to 1.
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
    """Trains a run, or one part of it, in a child process. The last part adds a model version."""

    def __init__(
        self,
        store: Store,
        settings: TrainingSettings,
        start: Callable[[Mapping[str, str]], ChildConnection] = _start,
        drain_within_s: float = DRAIN_WITHIN_S,
    ) -> None:
        self._store = store
        self._drain_within_s = drain_within_s
        self._settings = settings
        self._start = start

    def run(self, work: Work) -> Complete:
        """Train in a child process; return the function that writes the results and closes the job."""
        order = work.write(lambda session: self._make_order(session, work.job))
        if order is None:  # the run has ended meanwhile
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

    def retry_with_less_memory(self, session: Session, job: Job) -> bool:
        """Restart the run with half the batch size; return False if that was done before."""
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
        """Return environment variables for a child process: GPU, number of threads, proxies and keys of the bucket.

        They are set when the process starts, because TensorFlow reads them when it is imported.
        """
        devices = _devices(queue) | computing_threads(self._settings.threads)
        return devices | environments.proxies() | store_keys(self._store)

    def _make_order(self, session: Session, job: Job) -> TrainOrder | None:
        """Mark this part of the run as started; return the order for the child, or None if the run has ended."""
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
            checkpoint_share=self._settings.checkpoint_share,
            extraction=Extraction(**run.extraction) if run.extraction else None,
            spec=spec,
        )

    def _spec(self, session: Session, run: Run) -> TrainingSpec:
        """Return what the child needs for every part of a run.

        Also record on the run which weights it uses, so that all its parts use the same.
        """
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
            features=self._settings.features,
            pixels=self._settings.pixels,
            pixels_bytes=self._settings.pixels_bytes,
            image_limits=self._settings.image_limits,
            threads=self._settings.threads,
            source=self._settings.source,
            recipe=run.recipe if run.batch_size is None else {**run.recipe, "batch_size": run.batch_size},
            manifest=Digest(version.manifest_sha256),
            labels=tuple(count.name for count in version.class_counts),
            weights=Digest(run.weights_sha256) if run.weights_sha256 else None,
            candidates=candidates,
            bit_depth=version.bit_depth or FULL_DEPTH,
        )

    # --- after ------------------------------------------------------------------------------------------------------

    def _complete(self, session: Session, job: Job, end: PartEnd) -> None:
        """Write the results of a part, in the transaction that closes its job."""
        match end:
            case Prepared():
                run_jobs.queue_folds(session, job)
            case FoldEnded():
                self._end_fold(session, job, end)
            case RunOutcome():
                self._end_run(session, job, end)
        if jobs.is_cancel_requested(
            session, job.id
        ):  # the request came so late that the work was already done: no further part may start
            self.cancelled(session, job)

    def _end_fold(self, session: Session, job: Job, end: FoldEnded) -> None:
        if run_jobs.lock_active_run(session, job) is None:
            delete_unreferenced_after_commit(session, self._store, [end.outcome])
            return
        run_jobs.finish_fold(session, job, _fold(job.subject_id, end))
        _note_fold(session, self._store, job.subject_id, end.result.number)

    def _end_run(self, session: Session, job: Job, end: RunOutcome) -> None:
        """Close the run as succeeded: record its files and add the model version."""
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


# The last message of the child for each part.
_LAST: Mapping[TrainPart, type[PartEnd]] = {
    TrainPart.PREPARE: Prepared,
    TrainPart.FOLD: FoldEnded,
    TrainPart.FINAL: RunOutcome,
    TrainPart.ALL: RunOutcome,
}


def _part(job: Job, run: Run) -> TrainPart:
    """Return which part of the run a job trains."""
    match job.kind:
        case JobKind.FOLD:
            return TrainPart.FOLD
        case JobKind.FINAL:
            return TrainPart.FINAL
        case _:
            return TrainPart.PREPARE if run_jobs.has_fold_jobs(run) else TrainPart.ALL


# Messages that are written to the database. Those in the second tuple are written at once, because later attempts
# continue from them or users wait for them.
_ROWS = (Progress, EpochEnded, FoldEnded, CheckpointWritten, Extracted, FileWritten)
_ROWS_AT_ONCE = (FoldEnded, CheckpointWritten, Extracted, FileWritten)


class ProgressWriter:
    """Receives the messages of a training child, writes them to the database, and answers its questions.

    Several messages are written in one transaction, at most twice a second: a small head has many epochs per second.
    """

    def __init__(self, work: Work, child: ChildConnection, store: Store, last: type[PartEnd]) -> None:
        """Prepare to write for one job. `last` is the type of the message that ends it."""
        self._work = work
        self._child = child
        self._store = store
        self._last = last
        self._writes = 1
        self._written_at = work.clock.now()
        self._unwritten: list[ChildMessage] = []
        self._is_unsure = False

    def write_until_end(self) -> PartEnd:
        """Receive messages, write them and answer questions, until the child has finished; return the last message.

        Raises the errors of `ChildConnection.receive`, and Crashed if the child exits without the last message.
        """
        while True:
            try:
                message = self._child.receive(self._work)
            except ChildEnded:
                raise Crashed("The process ended without a result. See the worker's log for the reason.") from None
            is_end = isinstance(message, self._last)
            if not is_end and message is not None:
                if isinstance(message, Alive):
                    self._work.report_progress(message.step_s)
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
        """Ask the child to write its last checkpoints and to exit, and write the messages that it still sends.

        If the child finishes its part meanwhile, return the last message and write nothing, because `closing` writes
        everything in one transaction. If it is unknown whether the transaction before was committed, write and return
        None: the part is then repeated.
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
        """Return a function that writes the remaining messages and then calls `complete`, in one transaction."""

        def close(session: Session) -> None:
            self._write_rows(session)
            complete(session)

        return close

    @property
    def _is_due(self) -> bool:
        return self._work.clock.now() - self._written_at >= _WRITE_EVERY_S

    @property
    def _has_advanced(self) -> bool:
        """Whether the unwritten messages include a checkpoint or the end of a fold."""
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
        """Write the unwritten messages, unless an earlier try has written them.

        The connection may be lost during a commit. Then this runs again, and a number in the progress of the job shows
        whether the messages were written. After a checkpoint or the end of a fold, attempts are counted from 1 again.
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
    """Compute the progress of a run from the progress of its jobs and the times of its folds, and write it."""
    ended_s = [fold.seconds or 0.0 for fold in runs.get_folds(session, run.id)]
    noted = [progress["said"] for progress in run_jobs.get_progress(session, run)]
    states = [JobProgress.model_validate(state) for state in noted if state]
    progress = ProgressEstimator.of_run(Mode(run.recipe["mode"]), run_jobs.count_folds(run), ended_s, states)
    runs.set_progress(session, run.id, runs.progress(**progress))


def _answer(session: Session, run_id: str, store: Store, question: ChildMessage) -> Answer:
    """Store what the question contains, if anything, and return the answer for the child."""
    match question:
        case WeightsObtained():
            weights = Weights(
                network=question.network, name=question.name, sha256=question.sha256, source=question.source
            )
            registry.set_weights(session, weights)
            run = session.get_one(Run, run_id)
            if not run.state.is_final:  # otherwise the weights would be kept for a run that has ended
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
            if digest != question.digest:  # another run has recorded an export first
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
            raise RuntimeError(f"Expected a question from a training child. Received {other!r}. This is a bug.")


def _settle_quantised(
    session: Session, run_id: str, store: Store, question: FindQuantised | AddQuantised
) -> Digest | None:
    """Return the quantised network for this run, or None if the child must make one.

    All parts of a run use the same one, so the answer is recorded on the run.
    """
    run = runs.lock_run(session, run_id)
    settled = Digest(run.quantised_sha256) if run.quantised_sha256 else None
    is_anew = bool(run.recipe.get("recalibrate"))
    backbone, image_rule = question.backbone, question.image_rule
    lock_files(session)  # garbage collection must not delete the file before a row names it
    if isinstance(question, AddQuantised):
        made = question.digest
        if settled is None:
            newest = registry.find_quantised_backbone(session, backbone, image_rule)
            is_anew = is_anew or (newest is not None and not store.has(Digest(newest.sha256)))
            made_on = question.facts | {"dataset_version": run.dataset_version_id}
            row = registry.add_quantised_backbone(session, backbone, image_rule, made, made_on, is_anew=is_anew)
            settled = Digest(row.sha256)
        if settled != made:  # another run, or another part of this one, has recorded a network first
            delete_unreferenced_after_commit(session, store, [made])
    elif settled is None and not is_anew:
        found = registry.find_quantised_backbone(session, backbone, image_rule)
        settled = Digest(found.sha256) if found and store.has(Digest(found.sha256)) else None
    if not run.state.is_final:
        run.quantised_sha256 = settled
    return settled


def _devices(queue: Queue) -> dict[str, str]:
    """Return environment variables that show one GPU to jobs of the queue `gpu`, and no GPU to other jobs."""
    if queue is not Queue.GPU:
        return {"CUDA_VISIBLE_DEVICES": "-1"}
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {"CUDA_VISIBLE_DEVICES": mine, "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def _fold(run_id: str, ended: FoldEnded) -> Fold:
    return Fold(run_id=run_id, outcome_sha256=ended.outcome, **asdict(ended.result))


def _note_fold(session: Session, store: Store, run_id: str, number: int) -> None:
    """Add the fold to the outbox for MLflow, and delete its checkpoints."""
    add_to_outbox(session, run_id, "fold", {"fold": number})
    delete_unreferenced_after_commit(session, store, runs.drop_checkpoints(session, run_id, number))


def _add_checkpoint(session: Session, store: Store, run_id: str, written: CheckpointWritten) -> None:
    part = FINAL_PART if written.fold is None else written.fold
    useless = runs.add_checkpoint(session, run_id, part, written.epochs, written.sha256, written.size_bytes)
    delete_unreferenced_after_commit(session, store, useless)


def _add_file(session: Session, run_id: str, file: StoredFile) -> None:
    runs.add_artifact(session, run_id, file.name.value, file.sha256, file.size_bytes, file.media_type)
