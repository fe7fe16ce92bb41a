"""Trains a run, a part at a time: the worker's side. The network itself only lives in a child process.

A child that has done one part of a run is kept for the next one, which needs the same data and the same network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

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
from models.outbox import owe
from models.project import Principal
from models.registry import Backbone, Weights
from models.run import FINAL_PART, EventKind, Fold, Run
from recipes.catalogue import BackboneName
from recipes.recipe import AUTO, Mode
from worker.child.weights import Source
from worker.child_process import Child, Died, Message, Talking, computing_threads, store_keys
from worker.lease import Complete, Handler, Reason, Stopped, Work
from worker.run_progress import whole

_WRITE_EVERY_S = 0.5
DRAIN_WITHIN_S = 12.0


@dataclass(frozen=True)
class TrainingPlace:
    """Where training happens, as its child process is told; checkpoints may take `checkpoint_share` of the time."""

    features: str
    pixels: str
    pixels_bytes: int
    image_limits: ImageLimits
    threads: int
    source: Source
    checkpoint_share: float


def _start(environment: Mapping[str, str]) -> Child:
    return Child(environment=environment)


class Train(Handler):
    """The jobs that train a run and add what came out as a model version: train, fold and final."""

    def __init__(
        self,
        store: Store,
        place: TrainingPlace,
        start: Callable[[Mapping[str, str]], Talking] = _start,
        drain_within_s: float = DRAIN_WITHIN_S,
    ) -> None:
        self._store = store
        self._drain_within_s = drain_within_s
        self._place = place
        self._start = start

    def run(self, work: Work) -> Complete:
        """Train in a child process; return what closes the job."""
        order = work.write(lambda session: self._begin(session, work.job))
        if order is None:  # the run was closed meanwhile
            return lambda session: None
        child = work.bench.take(work.subject_id) or self._start(self._surroundings(work.job.queue))
        conversation = _Conversation(work, child, self._store, self._drain_within_s)
        try:
            child.order(order)
            last = conversation.until(_LAST[order["part"]])
        except BaseException as error:
            is_draining = isinstance(error, Stopped) and error.reason is Reason.DRAINING
            end = conversation.leave(_LAST[order["part"]]) if is_draining else None
            child.stop()
            if isinstance(error, Died):
                raise error.as_failure() from error
            if end is None:
                raise
            return conversation.closing(partial(self._complete, job=work.job, last=end))
        if order["part"] == "all" or order["part"] == "final":
            child.stop()
        else:
            work.bench.keep(work.subject_id, child)
        return partial(self._complete, job=work.job, last=last)

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
        """Begin the run anew at half the batch, once."""
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
        """Return the variables of a child: set here, since the child may need TensorFlow before its first order."""
        return _devices(queue) | computing_threads(self._place.threads) | store_keys(self._store)

    def _begin(self, session: Session, job: Job) -> dict[str, Any] | None:
        """Note that a part is worked on; return the order for the child, or None if there is nothing to do."""
        run = run_jobs.mark_started(session, job)
        if run is None:
            return None
        comparisons.on_run_started(session, run.id)
        version = session.get_one(DatasetVersion, run.dataset_version_id)
        backbone, candidates = run.recipe["backbone"], {}
        if run.weights_sha256 is None and backbone == AUTO:
            candidates = {
                row.network: row.sha256 for row in registry.find_weights_by_name(session, run.recipe["weights"])
            }
        elif run.weights_sha256 is None and backbone is not None:
            known = registry.find_weights(session, BackboneName(backbone), run.recipe["weights"])
            run.weights_sha256 = known.sha256 if known else None
        recipe = run.recipe if run.batch_size is None else {**run.recipe, "batch_size": run.batch_size}
        return {
            "kind": "train",
            "part": _part(job, run),
            "fold": job.index,
            "outcomes": {fold.number: fold.outcome_sha256 for fold in runs.get_folds(session, run.id)},
            "checkpoints": {
                "final" if part == FINAL_PART else part: digests
                for part, digests in runs.get_checkpoints(session, run.id).items()
            },
            "checkpoint_share": self._place.checkpoint_share,
            "extraction": run.extraction,
            "experiment": {
                "run": run.id,
                "store": asdict(self._store.address),
                "features": self._place.features,
                "pixels": self._place.pixels,
                "pixels_bytes": self._place.pixels_bytes,
                "image_limits": asdict(self._place.image_limits),
                "threads": self._place.threads,
                "source": asdict(self._place.source),
                "recipe": recipe,
                "manifest": version.manifest_sha256,
                "labels": [count.name for count in version.class_counts],
                "weights": run.weights_sha256,
                "candidates": candidates,
            },
        }

    # --- after ------------------------------------------------------------------------------------------------------

    def _complete(self, session: Session, job: Job, last: Message) -> None:
        """Write what a part leaves, in the transaction that closes its job."""
        match last["type"]:
            case "prepared":
                run_jobs.queue_folds(session, job)
            case "fold":
                self._end_fold(session, job, last)
            case "outcome":
                self._end_run(session, job, last)
        if jobs.is_cancel_requested(session, job.id):  # asked for in its last moment: what it has made due is not begun
            self.cancelled(session, job)

    def _end_fold(self, session: Session, job: Job, last: Message) -> None:
        if run_jobs.lock_active_run(session, job) is None:
            delete_unreferenced_after_commit(session, self._store, [Digest(last["outcome"])])
            return
        run_jobs.finish_fold(session, job, _fold(job.subject_id, last))
        _end_of_fold(session, self._store, job.subject_id, last)

    def _end_run(self, session: Session, job: Job, last: Message) -> None:
        """Close the run with its model version."""
        run = run_jobs.mark_succeeded(session, job, last["metrics"], last["training_s"])
        made = [Digest(last["bundle"]), Digest(last["backbone"]), *(Digest(file["sha256"]) for file in last["files"])]
        if run is None:
            delete_unreferenced_after_commit(session, self._store, made)
            return
        for file in last["files"]:
            _add_file(session, run.id, file)
        registry.add_model_version(
            session, Principal(run.project_id), run.name, run.id, Digest(last["bundle"]), Digest(last["backbone"])
        )
        comparisons.on_run_ended(session, run.id)
        delete_unreferenced_after_commit(session, self._store, run_jobs.drop_leftovers(session, run.id))


# What is written as soon as it is heard: others go on from it, or look at it.
_AT_ONCE = ("fold", "checkpoint", "extraction", "file")
# The message that ends each part.
_LAST = {"prepare": "prepared", "fold": "fold", "final": "outcome", "all": "outcome"}


def _part(job: Job, run: Run) -> str:
    """Return what the child is to do of a run."""
    match job.kind:
        case JobKind.FOLD:
            return "fold"
        case JobKind.FINAL:
            return "final"
        case _:
            return "prepare" if run_jobs.has_fold_jobs(run) else "all"


class _Conversation:
    """What a child says about a part of a run, on its way into the database.

    Events are written together, some times a second at most: a fast head has many epochs in one.
    """

    def __init__(self, work: Work, child: Talking, store: Store, drain_within_s: float) -> None:
        self._drain_within_s = drain_within_s
        self._work = work
        self._child = child
        self._store = store
        self._writes = 1
        self._written_at = work.clock.now()
        self._epochs: list[dict[str, Any]] = []
        self._folds: list[Message] = []
        self._said: dict[str, Any] | None = None
        self._checkpoints: list[Message] = []
        self._others: list[Callable[[Session], None]] = []
        self._is_unsure = False

    def until(self, last: str) -> Message:
        """Listen until a part is done; return the message that ends it. Raises what `Child.receive` does."""
        while True:
            message = self._child.receive(self._work, idle=self._write_if_due)
            if message is None:
                raise Crashed("The process ended without a result. The worker's log has more.")
            if message["type"] == last:
                self._write()
                return message
            self._hear(message)

    def leave(self, last: str) -> Message | None:
        """Have the child keep how far it is, and write that.

        If it comes to the end of its part meanwhile, return its last message and write nothing: `closing` does, with
        the end. Where nobody knows whether what came before was written, the part is done once more.
        """
        end: Message | None = None
        for message in self._child.drain(self._drain_within_s):
            if message["type"] == last:
                end = message
            else:
                self._note(message)
        if end is None or self._is_unsure:
            self._work.write_on_leaving(self._change)
            return None
        return end

    def closing(self, complete: Complete) -> Complete:
        """Return what writes all that was noted and then what closes the job, in one transaction."""

        def close(session: Session) -> None:
            self._keep(session)
            complete(session)

        return close

    def _hear(self, message: Message) -> None:
        if self._note(message):
            self._write_if_due(at_once=message["type"] in _AT_ONCE)
            return
        match message["type"]:
            case "alive":
                self._work.moved(message["step_s"])
            case _:
                ask = partial(_answer, run_id=self._work.subject_id, store=self._store, asked=message)
                self._child.send({"type": "answer"} | self._work.write(ask))

    def _note(self, message: Message) -> bool:
        """Note what is to be written with others; return False for a message of another kind."""
        match message["type"]:
            case "progress":
                self._said = message["state"]
            case "epoch":
                self._epochs.append({name: message[name] for name in ("fold", "epoch", "metrics")})
            case "fold":
                self._folds.append(message)
            case "checkpoint":
                self._checkpoints.append(message)
            case "extraction":
                extraction = message["extraction"]
                self._others.append(
                    partial(runs.record_extraction, run_id=self._work.subject_id, extraction=extraction)
                )
            case "file":
                self._others.append(partial(_add_file, run_id=self._work.subject_id, file=message["file"]))
            case _:
                return False
        return True

    def _write_if_due(self, at_once: bool = False) -> None:
        if at_once or self._work.clock.now() - self._written_at >= _WRITE_EVERY_S:
            self._write()

    def _write(self) -> None:
        """Write what was noted, if there is anything."""
        if self._epochs or self._folds or self._said or self._checkpoints or self._others:
            self._is_unsure = True
            self._work.write(self._change)
            self._is_unsure = False
            if self._folds or self._checkpoints:
                self._work.job.attempt = 1
            self._epochs, self._folds, self._said, self._checkpoints, self._others = [], [], None, [], []
            self._writes += 1
            self._written_at = self._work.clock.now()

    def _change(self, session: Session) -> None:
        """Write it, and that attempts count from where the work stands now."""
        if self._keep(session) and (self._folds or self._checkpoints):
            session.get_one(Job, self._work.lease.job_id).attempt = 1

    def _keep(self, session: Session) -> bool:
        """Write it once; return whether it was now.

        Where the answer to a commit was lost, the job says that this was written before.
        """
        job = session.get_one(Job, self._work.lease.job_id)
        before = job.progress or {"writes": 0, "said": None}
        run = run_jobs.lock_active_run(session, job)
        if run is None or before["writes"] == self._writes:
            return False
        for change in self._others:
            change(session)
        for epoch in self._epochs:
            runs.add_event(session, run.id, EventKind.EPOCH, epoch)
        for message in self._folds:
            runs.add_fold(session, _fold(run.id, message))
            _end_of_fold(session, self._store, run.id, message)
        for message in self._checkpoints:
            _add_checkpoint(session, self._store, run.id, message)
        job.progress = {"writes": self._writes, "said": self._said or before["said"]}
        session.flush()
        if self._said is not None:
            ended_s = [fold.seconds or 0.0 for fold in runs.get_folds(session, run.id)]
            said = [progress["said"] for progress in run_jobs.get_progress(session, run) if progress["said"]]
            progress = whole(Mode(run.recipe["mode"]), run_jobs.count_folds(run), ended_s, said)
            runs.set_progress(session, run.id, runs.progress(**progress))
        return True


def _answer(session: Session, run_id: str, store: Store, asked: Message) -> dict[str, Any]:
    """Answer what the child wants to know, or note what it found."""
    match asked["type"]:
        case "weights":
            weights = Weights(
                network=BackboneName(asked["network"]),
                name=asked["name"],
                sha256=asked["sha256"],
                source=asked["source"],
            )
            registry.set_weights(session, weights)
            run = session.get_one(Run, run_id)
            if not run.state.is_final:  # else nobody would ever forget them
                run.weights_sha256 = asked["sha256"]
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
                delete_unreferenced_after_commit(session, store, [Digest(asked["digest"])])
            return {"digest": digest}
        case "find_quantised" | "add_quantised":
            return {"digest": _settle_quantised(session, run_id, store, asked)}
        case "find_pick":
            return {"pick": session.get_one(Run, run_id).features_choice}
        case "set_pick":
            run = session.get_one(Run, run_id)
            if not run.state.is_final:
                run.features_choice, run.weights_sha256 = asked["pick"], asked["pick"]["weights"]
            return {}
        case "find_choice":
            return {"choice": session.get_one(Run, run_id).precision_choice}
        case "set_choice":
            run = session.get_one(Run, run_id)
            if not run.state.is_final:
                run.precision_choice = asked["choice"]
            return {}
        case unknown:
            raise RuntimeError(f"The child asked {unknown!r}, which nobody answers. This is a bug.")


def _settle_quantised(session: Session, run_id: str, store: Store, asked: Message) -> Digest | None:
    """Return the quantised network that a run is to use, the same for all its parts, or None if it is to make one."""
    run = runs.lock_run(session, run_id)
    settled = Digest(run.quantised_sha256) if run.quantised_sha256 else None
    is_anew = bool(run.recipe.get("recalibrate"))
    backbone, image_rule = Digest(asked["backbone"]), asked["image_rule"]
    lock_files(session)  # nobody collects what is about to be named
    if asked["type"] == "add_quantised":
        made = Digest(asked["digest"])
        if settled is None:
            newest = registry.find_quantised_backbone(session, backbone, image_rule)
            is_anew = is_anew or (newest is not None and not store.has(Digest(newest.sha256)))
            made_on = asked["facts"] | {"dataset_version": run.dataset_version_id}
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
    """Let a job of the queue `gpu` see one GPU, whose memory it takes as it needs it, and any other job none."""
    if queue is not Queue.GPU:
        return {"CUDA_VISIBLE_DEVICES": "-1"}
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {"CUDA_VISIBLE_DEVICES": mine, "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def _key(asked: Message) -> dict[str, Any]:
    key = dict(asked["key"])
    return {**key, "network": BackboneName(key["network"]), "weights": Digest(key["weights"])}


def _fold(run_id: str, message: Message) -> Fold:
    return Fold(run_id=run_id, outcome_sha256=message["outcome"], **message["result"])


def _end_of_fold(session: Session, store: Store, run_id: str, message: Message) -> None:
    """Owe what the end of a fold makes due, and drop what it makes useless."""
    number = message["result"]["number"]
    owe(session, run_id, "fold", {"fold": number})
    delete_unreferenced_after_commit(session, store, runs.drop_checkpoints(session, run_id, number))


def _add_checkpoint(session: Session, store: Store, run_id: str, message: Message) -> None:
    part = FINAL_PART if message["fold"] is None else message["fold"]
    digest = Digest(message["sha256"])
    useless = runs.add_checkpoint(session, run_id, part, message["epochs"], digest, message["size_bytes"])
    delete_unreferenced_after_commit(session, store, useless)


def _add_file(session: Session, run_id: str, file: Mapping[str, Any]) -> None:
    runs.add_artifact(session, run_id, file["name"], Digest(file["sha256"]), file["size_bytes"], file["media_type"])
