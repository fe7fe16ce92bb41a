"""The Celery tasks: one for each kind of job. Each task takes a job id and calls `JobRunner.run`."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

from broker import task_name
from models.job import JobKind
from worker.job_runner import JobFailed, Outcome


def add_tasks(app: Celery, run: Callable[[str], Outcome]) -> None:
    """Register `espalier.<kind>(job_id)` for every kind of job.

    `run` does the work. The task returns the `Outcome` of `run`, and fails with `JobFailed` if the job failed.
    """
    for kind in JobKind:

        @app.task(name=task_name(kind.value), throws=(JobFailed,), shared=False)  # type: ignore[untyped-decorator]
        def do(job_id: str) -> str:
            return run(job_id).value
