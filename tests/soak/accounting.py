"""Checks at the end of a soak that every run, model, file and page of MLflow is as it must be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx2
from soak.stream import SubmittedRun
from sqlalchemy import func, select

from artifacts.store import Store
from errors import EspalierError
from models import file_references
from models import run as runs
from models.job import Job, JobState
from models.registry import ModelVersion
from models.run import Fold, Run, RunState
from models.session import Database


def account(database: Database, store: Store, submitted: Sequence[SubmittedRun]) -> list[str]:
    """Return all violations in database and store as text, after all runs have ended."""
    wrong: list[str] = []
    with database.reading() as session:
        rows = {run.id: run for run in session.scalars(select(Run))}
        versions = Counter(session.scalars(select(ModelVersion.run_id)))
        folds = Counter(session.scalars(select(Fold.run_id)))
        unfinished = session.scalar(
            select(func.count()).select_from(Job).where(Job.state.in_((JobState.QUEUED, JobState.RUNNING)))
        )
        numbers = session.execute(
            select(ModelVersion.model_id, func.count(), func.max(ModelVersion.number)).group_by(ModelVersion.model_id)
        ).all()
        gaps = [run_id for run_id in rows if _has_gap(session, run_id)]
    wrong += [f"run {one.id} was confirmed and is not there" for one in submitted if one.id not in rows]
    wrong += [f"run {run_id} was never submitted" for run_id in rows.keys() - {one.id for one in submitted}]
    by_recipe: dict[int, dict[str, list[str]]] = {}
    for one in submitted:
        run = rows[one.id]
        succeeded = run.state is RunState.SUCCEEDED
        if not run.state.is_final:
            wrong.append(f"run {run.id} is {run.state.value} for ever")
        if versions[run.id] != succeeded:
            wrong.append(f"run {run.id} is {run.state.value} and made {versions[run.id]} versions")
        if succeeded and folds[run.id] != 2:
            wrong.append(f"run {run.id} has {folds[run.id]} folds of 2")
        if succeeded and one.recipe is None:
            wrong.append(f"run {run.id} diverges and succeeded")
        if succeeded and one.recipe is not None and run.batch_size is None:
            scores = {name: run.metrics[name] for name in ("accuracy", "loss", "confusion")} if run.metrics else {}
            by_recipe.setdefault(one.recipe, {}).setdefault(json.dumps(scores), []).append(run.id)
    wrong += [
        f"recipe {recipe} came to {len(found)} scores: {found}" for recipe, found in by_recipe.items() if len(found) > 1
    ]
    wrong += [
        f"model {model} has {count} versions, numbered to {last}" for model, count, last in numbers if count != last
    ]
    wrong += [f"the events of run {run_id} have a gap" for run_id in gaps]
    if unfinished:
        wrong.append(f"{unfinished} jobs never ended")
    return wrong + _files(database, store)


def _has_gap(session: Any, run_id: str) -> bool:
    return runs.last_event_number(session, run_id) != len(runs.get_events(session, run_id, after=0, limit=1_000_000))


def _files(database: Database, store: Store) -> list[str]:
    """Return missing, damaged and unreferenced files as text."""
    with database.reading() as session:
        expected = file_references.referenced_files(session)
    wrong = []
    for digest in expected:
        try:
            store.verified_path(digest)
        except EspalierError as error:
            wrong.append(f"file {digest}: {error.detail}")
    orphans = set(store.digests()) - expected
    return wrong + ([f"{len(orphans)} unreferenced files"] if orphans else [])


def account_mlflow(url: str) -> list[str]:
    """Return the runs and folds that MLflow shows more than once, as text."""
    with httpx2.Client(base_url=f"{url}/api/2.0/mlflow", timeout=30.0, trust_env=False) as server:
        found = server.post("/experiments/search", json={"max_results": 1000}).json()
        wrong = []
        for experiment in found["experiments"]:
            query = {"experiment_ids": [experiment["experiment_id"]], "max_results": 10_000}
            shown: Counter[tuple[str, str]] = Counter()
            for run in server.post("/runs/search", json=query).json().get("runs", ()):
                tags = {tag["key"]: tag["value"] for tag in run["data"].get("tags", ())}
                if "espalier.run" in tags:
                    shown[tags["espalier.run"], tags["espalier.fold"]] += 1
            wrong += [
                f"MLflow shows {part} of run {run} {count} times" for (run, part), count in shown.items() if count > 1
            ]
    return wrong
