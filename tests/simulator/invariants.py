"""Invariants of jobs, runs and comparisons after every transaction and at the end. Reads rows; changes none.

Does not use the code under test: rows are read with plain SQL and compared with those committed before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from models.job import KINDS_RETRIED_FOREVER, MAX_ATTEMPTS, Lease

Query = Callable[[str], Iterable[Sequence[Any]]]
"""Runs a SELECT on committed rows."""

_FINAL_STATES = ("succeeded", "failed", "cancelled")
_TRAINING = ("train", "fold", "final")
_RUN_TRANSITIONS = {
    "queued": ("running", "cancelled", "failed"),
    "running": ("queued", "succeeded", "failed", "cancelled"),
    "failed": ("queued",),
}
_COMPARISON_TRANSITIONS = {
    "queued": ("running", "failed", "cancelled"),
    "running": ("succeeded", "failed", "cancelled"),
    # A failed run of it is retried.
    "succeeded": ("running",),
    "failed": ("running",),
}


class InvariantViolated(Exception):
    """An invariant does not hold; the message says which."""


class JobRow(NamedTuple):
    """A row of the table of jobs."""

    kind: str
    subject_id: str
    number: int
    parent_id: str | None
    queue: str
    state: str
    attempt: int
    owner: str | None
    epoch: int
    renewals: int
    is_cancel_requested: bool

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self.state in _FINAL_STATES


class RunRow(NamedTuple):
    """A row of the table of runs."""

    state: str
    job_id: str | None
    batch_size: int | None
    folds: int
    mlflow_run_id: str | None
    has_started: int

    @property
    def is_final(self) -> bool:
        """Whether the run has ended; a failed run may be retried."""
        return self.state in _FINAL_STATES


class OutboxRow(NamedTuple):
    """A row of the outbox; `at` is part of it because SQLite reuses ids."""

    id: int
    run_id: str
    kind: str
    payload: str
    at: str


@dataclass(frozen=True)
class Snapshot:
    """All committed rows that the invariants are about."""

    jobs: Mapping[str, JobRow] = field(default_factory=dict)
    runs: Mapping[str, RunRow] = field(default_factory=dict)
    folds: Mapping[tuple[str, int], str | None] = field(default_factory=dict)
    versions: Sequence[str] = ()
    events: Mapping[str, int] = field(default_factory=dict)
    outbox: frozenset[OutboxRow] = frozenset()
    comparisons: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)
    comparison_of_run: Mapping[str, str] = field(default_factory=dict)
    files: frozenset[str] = frozenset()

    def of_attempt(self, run: RunRow) -> list[JobRow]:
        """Return the jobs of the current attempt of a run."""
        return [job for job_id, job in self.jobs.items() if run.job_id in (job_id, job.parent_id)]


@dataclass(frozen=True)
class Writer:
    """The thread that committed, with its lease if any; `cancels` is the run or comparison that it cancels."""

    name: str
    lease: Lease | None = None
    cancels: str | None = None


_FILES = (
    "SELECT outcome_sha256 FROM fold WHERE outcome_sha256 IS NOT NULL "
    "UNION SELECT sha256 FROM checkpoint UNION SELECT sha256 FROM run_artifact "
    "UNION SELECT bundle_sha256 FROM model_version UNION SELECT backbone_sha256 FROM model_version "
    "UNION SELECT picture_sha256 FROM comparison WHERE picture_sha256 IS NOT NULL "
    "UNION SELECT report_sha256 FROM comparison WHERE report_sha256 IS NOT NULL UNION SELECT sha256 FROM backbone"
)


def read_snapshot(query: Query) -> Snapshot:
    """Read all rows that the invariants are about, with one statement per table."""
    jobs = query(
        'SELECT id, kind, subject_id, "index", parent_id, queue, state, attempt, lease_owner, lease_epoch, renewals, '
        "cancel_requested_at IS NOT NULL FROM job"
    )
    runs = query(
        "SELECT id, state, job_id, batch_size, CAST(recipe -> 'folds' ->> 'k' AS INTEGER) * "
        "CAST(recipe -> 'folds' ->> 'repeats' AS INTEGER), mlflow_run_id, "
        "CASE WHEN started_at IS NULL THEN 0 ELSE 1 END FROM run"
    )
    outbox = query("SELECT id, run_id, kind, CAST(payload AS TEXT), CAST(created_at AS TEXT) FROM outbox")
    return Snapshot(
        jobs={row[0]: JobRow(*row[1:]) for row in jobs},
        runs={row[0]: RunRow(*row[1:]) for row in runs},
        folds={(row[0], row[1]): row[2] for row in query("SELECT run_id, number, outcome_sha256 FROM fold")},
        versions=sorted(row[0] for row in query("SELECT run_id FROM model_version")),
        events=_count_events(query("SELECT run_id, count(*), max(seq) FROM run_event GROUP BY run_id")),
        outbox=frozenset(OutboxRow(*row) for row in outbox),
        comparisons=dict(query("SELECT id, state FROM comparison")),  # type: ignore[arg-type]
        tables=dict(query('SELECT id, CAST("table" AS TEXT) FROM comparison WHERE "table" IS NOT NULL')),  # type: ignore[arg-type]
        comparison_of_run=dict(query("SELECT run_id, comparison_id FROM comparison_run")),  # type: ignore[arg-type]
        files=frozenset(row[0] for row in query(_FILES)),
    )


class Invariants:
    """Checks committed rows against the previously committed ones."""

    def __init__(self, query: Query, has_file: Callable[[str], bool]) -> None:
        self._query = query
        self._has_file = has_file
        self.snapshot = read_snapshot(query)
        # Runs that a client cancelled before they had ended.
        self.cancel_requested: set[str] = set()
        self._epochs: dict[str, int] = {}

    def check(self, writer: Writer) -> list[str]:
        """Check what was just committed; return the changes as text. Raises InvariantViolated."""
        before, after = self.snapshot, read_snapshot(self._query)
        if after == before:
            return []
        self.snapshot = after
        _check_lease(writer, before)
        for job_id, job in after.jobs.items():
            if job != before.jobs.get(job_id):
                self._check_job(job_id, before.jobs.get(job_id), job, writer)
        for run_id in after.runs:
            self._check_run(run_id, before, after, writer)
        for comparison_id in after.comparisons:
            _check_comparison(comparison_id, before, after)
        self.check_files()
        return _describe_changes(before, after)

    def check_files(self) -> None:
        """Check that every file referenced by a row exists, also after a rollback. Raises InvariantViolated."""
        for digest in self.snapshot.files:
            _require(self._has_file(digest), f"a row names a file that is gone: {digest[:12]}")

    def check_end(self) -> None:
        """Check that all runs, jobs and comparisons have ended. Raises InvariantViolated."""
        snapshot = self.snapshot
        for run_id, run in snapshot.runs.items():
            _require(run.is_final, f"a run is lost: {run_id} is {run.state} for ever")
        for job_id, job in snapshot.jobs.items():
            _require(job.is_final or job.kind == "publish", f"a job is {job.state} for ever: {job_id} ({job.kind})")
        for comparison_id, state in snapshot.comparisons.items():
            _require(state in _FINAL_STATES, f"a comparison is lost: {comparison_id} is {state} for ever")

    def is_quiet(self) -> bool:
        """Return whether all jobs except those that publish, and all runs, have ended."""
        snapshot = self.snapshot
        return all(job.is_final or job.kind == "publish" for job in snapshot.jobs.values()) and all(
            run.is_final for run in snapshot.runs.values()
        )

    def _check_job(self, job_id: str, was: JobRow | None, job: JobRow, writer: Writer) -> None:
        name = f"{job.kind} {job.number} ({job_id})"
        if was is None:  # publish jobs are queued and claimed in one transaction
            was = job._replace(state="queued", attempt=0, epoch=0)
        way = f"{was.state} → {job.state}"
        _require(not was.is_final, f"a job that was over changes, {way}: {name}")
        _require(
            job.kind in KINDS_RETRIED_FOREVER or job.attempt <= MAX_ATTEMPTS,
            f"more than {MAX_ATTEMPTS} attempts: {name}",
        )
        match was.state, job.state:
            case "queued", "running":
                _require(job.attempt == was.attempt + 1, f"an attempt that does not count: {name}")
                _require(job.epoch > max(was.epoch, self._epochs.get(job_id, 0)), f"a lease is given out twice: {name}")
                is_cancel_requested = job.kind in _TRAINING and job.subject_id in self.cancel_requested
                _require(not is_cancel_requested, f"begun although its run was asked to end: {name}")
                self._epochs[job_id] = job.epoch
            case "queued", "queued" | "cancelled":
                _require(job.attempt == was.attempt, f"an attempt that nobody made: {name}")
            case "running", "running":
                _require((job.epoch, job.owner) == (was.epoch, was.owner), f"{way}: {name}")
                # attempts start at 1 again when the work has advanced
                _require(job.attempt in (was.attempt, 1), f"{way} changed its attempts: {name}")
                _require(job.renewals in (was.renewals, was.renewals + 1), f"renewed twice at once: {name}")
            case "running", _ if writer.lease is not None and writer.lease.job_id == job_id:
                _require(job.epoch == was.epoch, f"a holder changed its own epoch: {name}")
                _require(job.attempt in (was.attempt, was.attempt - 1), f"{way} changed its attempts: {name}")
            case "running", _:
                _require(job.epoch == was.epoch + 1, f"a lease ended and its epoch was not counted up: {name}")
                _require(job.attempt == was.attempt, f"a take-over changed its attempts: {name}")
            case _:
                raise InvariantViolated(f"a job went {way}: {name}")

    def _check_run(self, run_id: str, before: Snapshot, after: Snapshot, writer: Writer) -> None:
        was, run = before.runs.get(run_id), after.runs[run_id]
        states = self._check_events(run_id, before, after)
        _require(
            (states[-1] if states else was and was.state) == run.state, f"its events do not tell its state: {run_id}"
        )
        if was is not None and was.state != run.state:
            _check_outbox(run_id, was, run, states, after.outbox - before.outbox)
        made = after.versions.count(run_id)
        _require(made == (run.state == "succeeded"), f"{run.state} with {made} model versions: {run_id}")
        numbers = {number for owner, number in after.folds if owner == run_id}
        _require(numbers <= set(range(run.folds)), f"a fold that it does not have: {run_id}")
        if run.state == "succeeded":
            _require(len(numbers) == run.folds, f"succeeded with {len(numbers)} of {run.folds} folds: {run_id}")
        mine = after.of_attempt(run)
        left = [job for job in mine if not job.is_final]
        _require(run.is_final or left, f"a run is lost: {run_id} is {run.state} and has no job left")
        finals = [job for job in mine if job.kind == "final" and job.state != "cancelled"]
        _require(len(finals) <= 1, f"two final jobs: {run_id}")
        for job in after.jobs.values():
            if (
                job.subject_id == run_id
                and job.kind in _TRAINING
                and not job.is_final
                and (run.is_final or job not in mine)
            ):
                _require(job.is_cancel_requested, f"a {job.kind} job goes on though nobody needs it any more: {run_id}")
        self._note_cancel_request(run_id, was, run, writer)

    def _check_events(self, run_id: str, before: Snapshot, after: Snapshot) -> list[str]:
        """Check the new events of a run, and return the states that they report in order."""
        seq = before.events.get(run_id, 0)
        if after.events.get(run_id, 0) == seq:
            return []
        new = self._query(f"SELECT kind, payload FROM run_event WHERE run_id = '{run_id}' AND seq > {seq} ORDER BY seq")
        states = [_json(payload)["state"] for kind, payload in new if kind == "state"]
        was = before.runs.get(run_id)
        for earlier, later in pairwise([was.state, *states] if was else states):
            _require(later in _RUN_TRANSITIONS.get(earlier, ()), f"a run went {earlier} → {later}: {run_id}")
        return states

    def _note_cancel_request(self, run_id: str, was: RunRow | None, run: RunRow, writer: Writer) -> None:
        if was is not None and was.state == "failed" and run.state == "queued":
            self.cancel_requested.discard(run_id)
        elif not run.is_final and writer.cancels in (run_id, self.snapshot.comparison_of_run.get(run_id, "")):
            self.cancel_requested.add(run_id)


def _check_lease(writer: Writer, before: Snapshot) -> None:
    """Check that a thread with a lease still held it when it wrote."""
    if writer.lease is None:
        return
    job = before.jobs[writer.lease.job_id]
    is_held = job.state == "running" and job.epoch == writer.lease.epoch
    _require(
        is_held, f"{writer.name} wrote under a lease that was over: {job.kind} {job.number} ({writer.lease.job_id})"
    )


def _check_outbox(run_id: str, was: RunRow, run: RunRow, states: Sequence[str], outbox: frozenset[OutboxRow]) -> None:
    """Check that the outbox has a row for the new state of a run."""
    kinds = [row.kind for row in sorted(outbox) if row.run_id == run_id]
    failed_before_it_began = "failed" in states and not run.has_started
    starts = states.count("running") + failed_before_it_began
    _require(kinds.count("started") == starts, f"MLflow is not owed the start: {run_id}")
    if run.is_final and (was.state == "running" or was.mlflow_run_id is not None):
        _require(kinds[-1:] == ["finished"], f"MLflow is not owed the end: {run_id}")


def _check_comparison(comparison_id: str, before: Snapshot, after: Snapshot) -> None:
    was, state = before.comparisons.get(comparison_id), after.comparisons[comparison_id]
    if was is not None and was != state:
        is_way = state in _COMPARISON_TRANSITIONS.get(was, ())
        _require(is_way, f"a comparison went {was} → {state}: {comparison_id}")
    mine = [after.runs[run_id].state for run_id, owner in after.comparison_of_run.items() if owner == comparison_id]
    if state not in _FINAL_STATES and all(run in _FINAL_STATES for run in mine):
        left = [job for job in after.jobs.values() if job.subject_id == comparison_id and not job.is_final]
        _require(len(left) == 1, f"a comparison is lost: {comparison_id} has {len(left)} jobs left")
    if state == "failed":
        _require(
            all(run in _FINAL_STATES for run in mine), f"a comparison failed before its runs were over: {comparison_id}"
        )
    if state == "succeeded":
        rows = len(json.loads(after.tables[comparison_id])["rows"])
        _require(rows == mine.count("succeeded"), f"a run that succeeded is not in its table: {comparison_id}")


def _describe_changes(before: Snapshot, after: Snapshot) -> list[str]:
    """Return the differences between two snapshots, a line each."""
    said = []
    for job_id, job in after.jobs.items():
        was = before.jobs.get(job_id)
        if was != job:
            cancel_requested = ", asked to end" if job.is_cancel_requested else ""
            way = f"{was.state} → {job.state}" if was and was.state != job.state else job.state
            said.append(
                f"{job.kind} {job.number} of {job.subject_id[-6:]}: {way} (attempt {job.attempt}, epoch {job.epoch}, "
                f"renewals {job.renewals}{cancel_requested})"
            )
    for run_id, run in after.runs.items():
        earlier = before.runs.get(run_id)
        if earlier != run:
            said.append(f"run {run_id[-6:]}: {earlier.state if earlier else 'nothing'} → {run.state}")
    for key in sorted(after.folds.keys() - before.folds.keys()):
        said.append(f"fold {key[1]} of run {key[0][-6:]} is kept")
    for key in sorted(before.folds.keys() - after.folds.keys()):
        said.append(f"fold {key[1]} of run {key[0][-6:]} is dropped")
    for row in sorted(after.outbox - before.outbox):
        said.append(f"MLflow is owed: {row.kind} of {row.run_id[-6:]}")
    for row in sorted(before.outbox - after.outbox):
        said.append(f"MLflow was told: {row.kind} of {row.run_id[-6:]}")
    for comparison_id, state in after.comparisons.items():
        if before.comparisons.get(comparison_id) != state:
            said.append(f"comparison {comparison_id[-6:]}: {state}")
    return said


def _count_events(rows: Iterable[Sequence[Any]]) -> dict[str, int]:
    counted = {}
    for run_id, count, last in rows:
        _require(count == last, f"event numbers have a gap: {run_id} has {count} up to {last}")
        counted[run_id] = last
    return counted


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _require(is_so: object, otherwise: str) -> None:
    if not is_so:
        raise InvariantViolated(otherwise)
