"""Where queued runs stand in their queues, and when they are likely to end. Estimates use the times of past runs."""

from __future__ import annotations

import heapq
import json
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, load_only

from models import worker as workers
from models.base import now
from models.dataset import DatasetVersion
from models.job import Job, JobState, Queue
from models.run import Run, RunState
from models.run_jobs import TRAINING

STAGES_WITH_ETA = ("folds", "final")
"""The stages of a run whose ETA covers the whole run. In other stages, it covers only the current stage."""

# How many runs are read for an estimate: the newest that succeeded.
_PAST_RUNS = 100


@dataclass(frozen=True)
class QueuePlace:
    """The place of a queued run in its queue.

    Attributes:
        position: number of jobs until the run is next, itself included; 1 is the next.
        eta_s: estimated seconds until the run ends. None if no worker serves the queue, or if the time of this run or
            of one before it is unknown, because no similar run has succeeded yet.
    """

    position: int
    eta_s: float | None


def find_places(session: Session, runs: Iterable[Run], live_s: float) -> dict[str, QueuePlace]:
    """Return the places of those runs that are queued, by run id.

    A run that a worker is just starting has none.

    Args:
        session: an open transaction.
        runs: any runs.
        live_s: maximum seconds since a worker was last seen for it to count as live.
    """
    queued = {run.id for run in runs if run.state is RunState.QUEUED}
    if not queued:
        return {}
    mine = (Job.kind.in_(TRAINING), Job.subject_id.in_(queued), Job.state == JobState.QUEUED)
    queues = session.scalars(select(Job.queue).where(*mine).distinct()).all()
    times = _PastTimes(session)
    places: dict[str, QueuePlace] = {}
    for queue in queues:
        places |= _places_in(session, queue, workers.count_live(session, queue, live_s), times)
    return {run_id: place for run_id, place in places.items() if run_id in queued}


def _places_in(session: Session, queue: Queue, live: int, times: _PastTimes) -> dict[str, QueuePlace]:
    """Return the places of all runs that wait in a queue, by run id."""
    query = select(Job.kind, Job.subject_id).where(Job.queue == queue, Job.state == JobState.QUEUED)
    waiting = session.execute(query.order_by(Job.priority.desc(), Job.id)).all()
    first: dict[str, int] = {}
    for position, (kind, subject_id) in enumerate(waiting, 1):
        if kind in TRAINING:
            first.setdefault(subject_id, position)
    started = select(Job.subject_id).where(
        Job.queue == queue, Job.state == JobState.RUNNING, Job.kind.in_(TRAINING), Job.subject_id.not_in(list(first))
    )
    known = {run.id: run for run in _without_results(session, [*first, *session.scalars(started)])}
    free_at = _WorkerTimes(live, [times.left_s(run) for run in known.values() if run.id not in first])
    ordered = sorted((run for run in known.values() if run.id in first), key=lambda run: first[run.id])
    return {run.id: QueuePlace(first[run.id], free_at.take(times.left_s(run))) for run in ordered}


class _WorkerTimes:
    """The seconds until each worker of a queue is free, if every free worker takes the next run.

    They are unknown from the first run on whose time is unknown.
    """

    def __init__(self, live: int, left_s: Collection[float | None]) -> None:
        """`live` workers serve the queue and have runs that need `left_s` seconds."""
        known = [left for left in left_s if left is not None]
        self._free_at = [0.0] * max(0, live - len(known)) + known
        self._is_known = live > 0 and len(known) == len(left_s)
        heapq.heapify(self._free_at)

    def take(self, run_s: float | None) -> float | None:
        """Have the next run, which needs `run_s` seconds, done; return the seconds until its end, or None."""
        if run_s is None:
            self._is_known = False
        if not self._is_known or run_s is None:
            return None
        end = heapq.heappop(self._free_at) + run_s
        heapq.heappush(self._free_at, end)
        return end


class _PastTimes:
    """The seconds that runs took from their start to their end, of the newest runs that succeeded.

    Runs are similar if they have the same mode, network, image size and number of folds. A run is likely to take as
    long as similar runs on the same data set version, or without any, as long per image as similar runs on others.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._per_image: dict[str, list[float]] = defaultdict(list)
        query = (
            select(Run.recipe, Run.dataset_version_id, Run.started_at, Run.finished_at, DatasetVersion.images)
            .join(DatasetVersion, DatasetVersion.id == Run.dataset_version_id)
            .where(Run.state == RunState.SUCCEEDED)
            .order_by(Run.id.desc())
        )
        for recipe, version_id, started_at, finished_at, images in session.execute(query.limit(_PAST_RUNS)):
            if started_at and finished_at:
                seconds = (finished_at - started_at).total_seconds()
                self._seconds[version_id, _network(recipe)].append(seconds)
                self._per_image[_network(recipe)].append(seconds / max(1, images))

    def left_s(self, run: Run) -> float | None:
        """Return the estimated seconds of work on a run that is left, or None if they are unknown."""
        if run.state is RunState.RUNNING and run.progress["stage"] in STAGES_WITH_ETA:
            eta_s: float | None = run.progress["eta_s"]
            return eta_s
        kind = _network(run.recipe)
        if same := self._seconds.get((run.dataset_version_id, kind)):
            whole_s = statistics.median(same)
        elif similar := self._per_image.get(kind):
            images = self._session.get_one(DatasetVersion, run.dataset_version_id).images
            whole_s = statistics.median(similar) * images
        else:
            return None
        if run.state is not RunState.RUNNING or run.started_at is None:
            return whole_s
        return max(0.0, whole_s - (now() - run.started_at).total_seconds())


def _network(recipe: dict[str, Any]) -> str:
    """Return what determines the time of a run on a data set, as a key."""
    parts = ("mode", "backbone", "network", "image_size", "folds")
    return json.dumps([recipe.get(part) for part in parts], sort_keys=True)


def _without_results(session: Session, run_ids: Collection[str]) -> Iterable[Run]:
    columns = (Run.dataset_version_id, Run.recipe, Run.state, Run.progress, Run.started_at)
    return session.scalars(select(Run).where(Run.id.in_(run_ids)).options(load_only(*columns)))
