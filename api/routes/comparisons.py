"""Routes of comparisons: several recipes on the same folds, and the table that they end in. Measures nothing."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse
from sqlalchemy import select
from sqlalchemy.orm import Session

from api import problems
from api.bodies import JsonRoute
from api.dependencies import PrincipalDep, Services, ServicesDep
from api.idempotency import IdempotencyDep
from api.paging import CursorQuery, LimitQuery, page
from api.routes.runs import filled, model_of, stored_file
from api.schemas import ComparisonOut, ComparisonProgress, ComparisonRequest, ComparisonRow, DifferenceOut, Page
from errors import NotReady, RecipeInvalid
from models import comparison as comparisons
from models import dataset as datasets
from models import registry
from models.base import now
from models.comparison import Comparison
from models.dataset import DatasetVersion
from models.project import scope
from models.registry import ModelVersion
from models.run import Run, RunState
from recipes.recipe import Recipe
from recipes.titles import difference_titles

router = APIRouter(prefix="/api/v1/comparisons", tags=["comparisons"], route_class=JsonRoute)

# What recipes must share to be tested on the same images.
_SHARED = ("seed", "folds.k", "folds.repeats", "task")

# Before them a run knows only how long its present stage takes.
_FORETOLD_IN = ("folds", "final")


@router.post("", status_code=202)
def start_comparison(
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    wanted: ComparisonRequest,
    idempotency: IdempotencyDep,
) -> ComparisonOut:
    """Train a run with each recipe on the same folds; the last one's end makes the table."""
    earlier = idempotency.find_answer(ComparisonOut, wanted, response)
    if earlier is not None:
        return earlier
    with services.database.writing() as session:
        dataset = datasets.get_dataset(session, principal, wanted.dataset, for_change=True)
        version = datasets.ready_version(session, dataset, wanted.version)
        recipes = [
            filled(session, recipe, version, f"recipes[{number}]") for number, recipe in enumerate(wanted.recipes)
        ]
        _check_comparable(recipes)
        comparison, due = comparisons.create_comparison(session, principal, version.id, wanted.name, recipes)
        shown = _comparison_out(session, comparison)
        location = response.headers["Location"] = f"/api/v1/comparisons/{shown.id}"
        idempotency.keep_answer(session, shown, location)
    if due:
        services.dispatcher.request()
    return shown


@router.get("")
def list_comparisons(
    services: ServicesDep, principal: PrincipalDep, limit: LimitQuery = 50, cursor: CursorQuery = None
) -> Page[ComparisonOut]:
    """List comparisons, the newest first."""
    with services.database.reading() as session:
        query = select(Comparison).where(scope(Comparison.project_id, principal))
        rows, next_cursor = page(session, query, Comparison.id, lambda row: row.Comparison.id, limit, cursor)
        return Page(items=[_comparison_out(session, row.Comparison) for row in rows], next_cursor=next_cursor)


@router.get("/{comparison_id}")
def get_comparison(services: ServicesDep, principal: PrincipalDep, comparison_id: str) -> ComparisonOut:
    """Show a comparison: its runs so far, and at its end the table."""
    with services.database.reading() as session:
        return _comparison_out(session, comparisons.get_comparison(session, principal, comparison_id))


@router.post("/{comparison_id}/cancel", status_code=202)
def cancel_comparison(services: ServicesDep, principal: PrincipalDep, comparison_id: str) -> ComparisonOut:
    """End a comparison with its unfinished runs; asking twice, or too late, changes nothing.

    One that has a table, since a run of it is tried again, gets its last one when that run has ended.
    """
    with services.database.writing() as session:
        comparison = comparisons.get_comparison(session, principal, comparison_id)
        due = comparisons.request_cancel(session, comparison.id)
        shown = _comparison_out(session, comparison)
    if due is not None:
        services.dispatcher.request()
    return shown


@router.get("/{comparison_id}/picture", response_class=FileResponse)
def get_picture(services: ServicesDep, principal: PrincipalDep, comparison_id: str) -> FileResponse:
    """Return the scores with their intervals as a picture."""
    with services.database.reading() as session:
        comparison = comparisons.get_comparison(session, principal, comparison_id)
    return _file(services, comparison, comparison.picture_sha256, "image/png")


@router.get("/{comparison_id}/report", response_class=FileResponse)
def get_report(services: ServicesDep, principal: PrincipalDep, comparison_id: str) -> FileResponse:
    """Return the table as Markdown."""
    with services.database.reading() as session:
        comparison = comparisons.get_comparison(session, principal, comparison_id)
    return _file(services, comparison, comparison.report_sha256, "text/markdown")


def _file(services: Services, comparison: Comparison, digest: str | None, media_type: str) -> FileResponse:
    if digest is None:
        raise NotReady(
            f"Comparison {comparison.id} has no table yet, or never will: expected it to have succeeded. Received "
            f"{comparison.state.value!r}."
        )
    return stored_file(services, digest, media_type)


def _check_comparable(recipes: Sequence[Recipe]) -> None:
    """See that recipes are tested on the same images and are not the same. Raises RecipeInvalid, naming the field."""
    first, *others = [recipe.flat() for recipe in recipes]
    for number, other in enumerate(others, start=1):
        for name in _SHARED:
            if other[name] != first[name]:
                field = f"recipes[{number}].{name}"
                raise RecipeInvalid(
                    field,
                    f"{field}: Expected {first[name]!r} as in recipes[0], so that both are tested on the same images. "
                    f"Received {other[name]!r}.",
                )
        earlier = recipes.index(recipes[number])
        if earlier < number:
            field = f"recipes[{number}]"
            raise RecipeInvalid(field, f"{field}: Expected recipes that differ. Received that of recipes[{earlier}].")


def _comparison_out(session: Session, comparison: Comparison) -> ComparisonOut:
    version = session.get_one(DatasetVersion, comparison.dataset_version_id)
    made = comparisons.get_runs(session, comparison.id)
    table = comparison.table or {}
    titles = difference_titles([run.recipe for run in made])
    versions = registry.get_run_versions(session, [run.id for run in made])
    measured = {row["position"]: row for row in table.get("rows", ())}
    return ComparisonOut(
        id=comparison.id,
        dataset=version.dataset_id,
        version=version.number,
        name=comparison.name,
        state=comparison.state,
        progress=_progress(comparison, made),
        metric=table.get("metric"),
        greater_is_better=table.get("greater_is_better"),
        best=table.get("best"),
        verdict=table.get("verdict"),
        interval=table.get("interval"),
        test=table.get("test"),
        rows=[
            _row_out(position, title, run, versions.get(run.id), measured.get(position, {}))
            for position, (title, run) in enumerate(zip(titles, made, strict=True))
        ],
        error=problems.stored_problem(comparison.error),
        created_at=comparison.created_at,
        finished_at=comparison.finished_at,
    )


def _row_out(
    position: int, title: str, run: Run, version: ModelVersion | None, measured: dict[str, Any]
) -> ComparisonRow:
    difference = measured.get("difference")
    return ComparisonRow(
        position=position,
        run=run.id,
        title=title,
        state=run.state,
        score=measured.get("score"),
        ci95=measured.get("ci95"),
        difference=DifferenceOut(**difference) if difference else None,
        training_s=run.training_s,
        extraction_s=(run.extraction or {}).get("seconds"),
        predict_ms=measured.get("predict_ms"),
        backbone_bytes=measured.get("backbone_bytes"),
        bundle_bytes=measured.get("bundle_bytes"),
        model=model_of(run, version),
        error=problems.stored_problem(run.error),
    )


def _progress(comparison: Comparison, made: Sequence[Run]) -> ComparisonProgress:
    ended = [run for run in made if run.state.is_final]
    running = [run for run in made if run.state is RunState.RUNNING]
    if comparison.state.is_final:
        stage = "done"
    elif len(ended) == len(made):
        stage = "comparing"
    else:
        stage = "training" if running or ended else "queued"
    fraction = statistics.fmean(1.0 if run.state.is_final else run.progress["fraction"] for run in made)
    return ComparisonProgress(
        stage=stage, fraction=fraction, ended=len(ended), runs=len(made), eta_s=_eta_s(stage, made, running)
    )


def _eta_s(stage: str, made: Sequence[Run], running: Sequence[Run]) -> float | None:
    """Return the seconds that are left, None if unknown: as many runs go on as run now, and take as long as others."""
    if stage not in ("training", "queued"):
        return None
    left = [run.progress["eta_s"] for run in running]
    typical_s = _typical_s(made)
    waiting = [run.recipe["mode"] for run in made if run.state is RunState.QUEUED]
    if None in left or any(mode not in typical_s for mode in waiting):
        return None
    together_s = sum(left) + sum(typical_s[mode] for mode in waiting)
    return float(max([*left, together_s / max(1, len(running))]))


def _typical_s(made: Sequence[Run]) -> dict[str, float]:
    """Return for each mode what its runs take: those that succeeded, or else those that can foretell their end."""
    ended, foretold = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for run in made:
        mode = run.recipe["mode"]
        if run.state is RunState.SUCCEEDED and run.started_at and run.finished_at:
            ended[mode].append((run.finished_at - run.started_at).total_seconds())
        left_s = run.progress["eta_s"] if run.progress["stage"] in _FORETOLD_IN else None
        if run.state is RunState.RUNNING and run.started_at and left_s is not None:
            foretold[mode].append((now() - run.started_at).total_seconds() + left_s)
    return {mode: statistics.fmean(takes) for mode, takes in (foretold | ended).items()}
