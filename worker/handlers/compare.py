"""Handles the job `compare`: starts the child process that compares the runs, and stores the table.

The child (`worker.child.compare`) reads the stored results of the runs and trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from sqlalchemy.orm import Session

from artifacts.run_files import RunFile
from artifacts.store import Digest, Store
from errors import EspalierError
from models import comparison as comparisons
from models import registry
from models import run as runs
from models.comparison import Comparison, ComparisonState
from models.dataset import DatasetVersion
from models.file_references import delete_unreferenced_after_commit
from models.job import Job
from models.outbox import add_to_outbox
from models.run import Run, RunState
from recipes.recipe import Task
from recipes.titles import difference_titles
from worker.child_process import Child, ChildConnection, ChildDied, messages, store_keys
from worker.lease import Complete, Handler, Reason, Stopped, Work
from worker.messages import ComparedRun, CompareOrder, ComparisonOutcome

StartChild = Callable[[CompareOrder, Mapping[str, str]], AbstractContextManager[ChildConnection]]


class Compare(Handler):
    """Compares the runs of a comparison in a child process, and closes the comparison with its table."""

    def __init__(self, store: Store, threads: int, start: StartChild = Child) -> None:
        self._store = store
        self._threads = threads
        self._start = start

    def run(self, work: Work) -> Complete:
        """Compare the runs in a child process; return the function that stores the table and closes the comparison.

        Raises Stopped if the comparison was cancelled before.
        """
        with work.database.reading() as session:
            state = session.get_one(Comparison, work.subject_id).state
            if state is ComparisonState.CANCELLED:  # before this job began
                raise Stopped(Reason.CANCELLED)
            if state.is_final:
                return lambda session: None
            order = self._order(session, work.subject_id)
        outcome: ComparisonOutcome | None = None
        try:
            with self._start(order, store_keys(self._store)) as child:
                for message in messages(child, work):
                    if isinstance(message, ComparisonOutcome):
                        outcome = message
        except ChildDied as death:
            raise death.as_failure() from death
        if outcome is None:
            raise RuntimeError("The child ended without an outcome. This is a bug.")
        done = outcome
        return lambda session: self._complete(session, work.subject_id, done)

    def failed(self, session: Session, job: Job, error: EspalierError) -> None:
        comparisons.fail_comparison(session, job.subject_id, error.record(), since=job.started_at or job.created_at)

    def cancelled(self, session: Session, job: Job) -> None:
        comparisons.cancel_comparison(session, job.subject_id)

    def _order(self, session: Session, comparison_id: str) -> CompareOrder:
        comparison = session.get_one(Comparison, comparison_id)
        version = session.get_one(DatasetVersion, comparison.dataset_version_id)
        assert version.manifest_sha256 is not None, "Runs train on a version that is ready. This is a bug."
        compared = comparisons.get_runs(session, comparison_id)
        titles = difference_titles([run.recipe for run in compared])
        return CompareOrder(
            store=self._store.address,
            threads=self._threads,
            manifest=Digest(version.manifest_sha256),
            labels=tuple(count.name for count in version.class_counts),
            name=comparison.name,
            runs=tuple(
                _compared(session, position, title, run)
                for position, (title, run) in enumerate(zip(titles, compared, strict=True))
                if run.state is RunState.SUCCEEDED
            ),
            failed=sum(run.state is RunState.FAILED for run in compared),
            cancelled=sum(run.state is RunState.CANCELLED for run in compared),
        )

    def _complete(self, session: Session, comparison_id: str, outcome: ComparisonOutcome) -> None:
        """Store the table and close the comparison.

        If the comparison was cancelled or one of its runs was started again meanwhile, discard the table.
        """
        picture, report = outcome.picture, outcome.report
        earlier = comparisons.get_files(session, comparison_id)
        is_shown = comparisons.succeed_comparison(session, comparison_id, outcome.table, picture, report)
        delete_unreferenced_after_commit(session, self._store, earlier if is_shown else [picture, report])
        if not is_shown:
            return
        for run in comparisons.get_runs(session, comparison_id):
            if run.state is RunState.SUCCEEDED:
                add_to_outbox(session, run.id, "comparison", {})


def _compared(session: Session, position: int, title: str, run: Run) -> ComparedRun:
    """Return the results of a succeeded run in the form that the child process needs."""
    version = registry.find_run_version(session, run.id)
    files = {file.name: file.sha256 for file in runs.get_artifacts(session, run.id)}
    assert version is not None and run.metrics is not None and run.training_s is not None
    return ComparedRun(
        position=position,
        title=title,
        task=Task(run.recipe["task"]),
        metrics=run.metrics,
        training_s=run.training_s,
        version=version.number,
        bundle=Digest(version.bundle_sha256),
        backbone=Digest(version.backbone_sha256),
        out_of_fold=Digest(files[RunFile.OUT_OF_FOLD]),
    )
