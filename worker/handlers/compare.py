"""Makes the table of a comparison: the worker's side. The child reads what the runs left; nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from sqlalchemy.orm import Session

from artifacts.store import Digest, Store
from errors import EspalierError
from models import comparison as comparisons
from models import registry
from models import run as runs
from models.comparison import Comparison
from models.dataset import DatasetVersion
from models.file_references import delete_unreferenced_after_commit
from models.job import Job
from models.outbox import owe
from models.run import Run, RunState
from recipes.titles import difference_titles
from worker.child_process import Child, Died, Message, Talking, store_keys
from worker.lease import Complete, Handler, Work

OUT_OF_FOLD = "out-of-fold.safetensors"

Start = Callable[[Mapping[str, Any], Mapping[str, str]], AbstractContextManager[Talking]]


class Compare(Handler):
    """The job that compares what the runs of a comparison measured."""

    def __init__(self, store: Store, threads: int, start: Start = Child) -> None:
        self._store = store
        self._threads = threads
        self._start = start

    def run(self, work: Work) -> Complete:
        """Compare in a child process; return what closes the comparison."""
        with work.database.reading() as session:
            if session.get_one(Comparison, work.subject_id).state.is_final:  # cancelled before this began
                return lambda session: None
            order = self._order(session, work.subject_id)
        outcome: Message | None = None
        try:
            with self._start(order, store_keys(self._store)) as child:
                while (message := child.receive(work)) is not None:
                    if message["type"] == "outcome":
                        outcome = message
        except Died as death:
            raise death.as_failure() from death
        if outcome is None:
            raise RuntimeError("The child ended without an outcome. This is a bug.")
        done = outcome
        return lambda session: self._complete(session, work.subject_id, done)

    def failed(self, session: Session, job: Job, error: EspalierError) -> None:
        comparisons.fail_comparison(session, job.subject_id, error.record(), since=job.started_at or job.created_at)

    def cancelled(self, session: Session, job: Job) -> None:
        comparisons.cancel_comparison(session, job.subject_id)

    def _order(self, session: Session, comparison_id: str) -> dict[str, Any]:
        comparison = session.get_one(Comparison, comparison_id)
        version = session.get_one(DatasetVersion, comparison.dataset_version_id)
        made = comparisons.get_runs(session, comparison_id)
        titles = difference_titles([run.recipe for run in made])
        return {
            "kind": "compare",
            "store": asdict(self._store.address),
            "threads": self._threads,
            "manifest": version.manifest_sha256,
            "labels": [count.name for count in version.class_counts],
            "name": comparison.name,
            "candidates": [
                _candidate(session, position, title, run)
                for position, (title, run) in enumerate(zip(titles, made, strict=True))
                if run.state is RunState.SUCCEEDED
            ],
        }

    def _complete(self, session: Session, comparison_id: str, outcome: Message) -> None:
        """Close the comparison with its table, unless it was cancelled or a run tried again while this was measured."""
        picture, report = Digest(outcome["picture"]), Digest(outcome["report"])
        earlier = comparisons.get_files(session, comparison_id)
        is_shown = comparisons.succeed_comparison(session, comparison_id, outcome["table"], picture, report)
        delete_unreferenced_after_commit(session, self._store, earlier if is_shown else [picture, report])
        if not is_shown:
            return
        for run in comparisons.get_runs(session, comparison_id):
            if run.state is RunState.SUCCEEDED:
                owe(session, run.id, "comparison", {})


def _candidate(session: Session, position: int, title: str, run: Run) -> dict[str, Any]:
    """Return what the child is told of a run that succeeded."""
    version = registry.find_run_version(session, run.id)
    files = {file.name: file.sha256 for file in runs.get_artifacts(session, run.id)}
    assert version is not None and run.metrics is not None and run.training_s is not None
    return {
        "position": position,
        "title": title,
        "task": run.recipe["task"],
        "metrics": run.metrics,
        "training_s": run.training_s,
        "version": version.number,
        "bundle": version.bundle_sha256,
        "backbone": version.backbone_sha256,
        "out_of_fold": files[OUT_OF_FOLD],
    }
