"""Routes of comparisons: start, show and cancel them, and get their pictures and reports. Workers do the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from sqlalchemy.orm import Session

from api import problems
from api.bodies import JsonRoute
from api.comparison_progress import comparison_progress
from api.dependencies import PrincipalDep, Services, ServicesDep
from api.files import StoredFile, file_answers, stored_file
from api.filters import DatasetQuery, NameQuery, filtered_versions
from api.idempotency import IdempotencyDep
from api.paging import CursorQuery, LimitQuery, next_cursor, page_request
from api.presentation import model_ref
from api.recipes import check_comparable, fill_recipe
from api.schemas import ComparisonOut, ComparisonRequest, ComparisonRow, DifferenceOut, Page
from errors import NotReady
from models import comparison as comparisons
from models import dataset as datasets
from models import registry, run_queue
from models.comparison import Comparison, ComparisonState
from models.dataset import DatasetVersion
from models.registry import ModelVersion
from models.run import Run
from models.run_queue import QueuePlace
from recipes.titles import difference_titles

router = APIRouter(prefix="/api/v1/comparisons", tags=["comparisons"], route_class=JsonRoute)


@router.post("", status_code=202)
def start_comparison(
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    body: ComparisonRequest,
    idempotency: IdempotencyDep,
) -> ComparisonOut:
    """Start a comparison: train one run with each recipe on the same folds, then make a table of the scores."""
    earlier = idempotency.find_answer(ComparisonOut, body, response)
    if earlier is not None:
        return earlier
    with services.database.writing() as session:
        dataset = datasets.get_dataset(session, principal, body.dataset, for_change=True)
        version = datasets.ready_version(session, dataset, body.version)
        recipes = [
            fill_recipe(session, recipe, version, f"recipes[{number}]") for number, recipe in enumerate(body.recipes)
        ]
        check_comparable(recipes)
        comparison, due = comparisons.create_comparison(session, principal, version.id, body.name, recipes)
        shown = _comparison_out(session, services, comparison)
        location = response.headers["Location"] = f"/api/v1/comparisons/{shown.id}"
        idempotency.keep_answer(session, shown, location)
    if due:
        services.dispatcher.request()
    return shown


@router.get("")
def list_comparisons(
    services: ServicesDep,
    principal: PrincipalDep,
    limit: LimitQuery = 50,
    cursor: CursorQuery = None,
    state: Annotated[ComparisonState | None, Query()] = None,
    dataset: DatasetQuery = None,
    name: NameQuery = None,
) -> Page[ComparisonOut]:
    """List comparisons, the newest first: all, or those of a state, a data set or a name."""
    with services.database.reading() as session:
        versions = filtered_versions(session, principal, dataset)
        page = comparisons.list_comparisons(session, principal, page_request(limit, cursor), state, name, versions)
        return Page(items=_comparisons_out(session, services, page.rows), next_cursor=next_cursor(page.next_after))


@router.get("/{comparison_id}")
def get_comparison(services: ServicesDep, principal: PrincipalDep, comparison_id: str) -> ComparisonOut:
    """Show a comparison with its runs, and with its table once all runs have ended."""
    with services.database.reading() as session:
        return _comparison_out(session, services, comparisons.get_comparison(session, principal, comparison_id))


@router.post("/{comparison_id}/cancel", status_code=202)
def cancel_comparison(services: ServicesDep, principal: PrincipalDep, comparison_id: str) -> ComparisonOut:
    """Cancel a comparison and its unfinished runs. If the comparison has already ended, nothing changes.

    A comparison that already has a table runs again only because one of its runs was retried. Then only that run is
    cancelled, and the comparison gets a new table.
    """
    with services.database.writing() as session:
        comparison = comparisons.get_comparison(session, principal, comparison_id)
        due = comparisons.request_cancel(session, comparison.id)
        shown = _comparison_out(session, services, comparison)
    if due is not None:
        services.dispatcher.request()
    return shown


@router.get("/{comparison_id}/picture", response_class=StoredFile, responses=file_answers("image/png"))
def get_picture(services: ServicesDep, principal: PrincipalDep, comparison_id: str) -> StoredFile:
    """Return a PNG picture of the scores and their confidence intervals."""
    with services.database.reading() as session:
        comparison = comparisons.get_comparison(session, principal, comparison_id)
    return _file(services, comparison, comparison.picture_sha256, "image/png")


@router.get("/{comparison_id}/report", response_class=StoredFile, responses=file_answers("text/markdown"))
def get_report(services: ServicesDep, principal: PrincipalDep, comparison_id: str) -> StoredFile:
    """Return the table of a comparison as Markdown."""
    with services.database.reading() as session:
        comparison = comparisons.get_comparison(session, principal, comparison_id)
    return _file(services, comparison, comparison.report_sha256, "text/markdown")


def _file(services: Services, comparison: Comparison, digest: str | None, media_type: str) -> StoredFile:
    if digest is None:
        raise NotReady(
            f"Comparison {comparison.id} is {comparison.state.value} and has no table. A comparison gets its table "
            "when it succeeds."
        )
    return stored_file(services.store, digest, media_type)


def _comparison_out(session: Session, services: Services, comparison: Comparison) -> ComparisonOut:
    return _comparisons_out(session, services, [comparison])[0]


def _comparisons_out(session: Session, services: Services, shown: Sequence[Comparison]) -> list[ComparisonOut]:
    made = [comparisons.get_runs(session, comparison.id, with_metrics=False) for comparison in shown]
    places = run_queue.find_places(session, chain.from_iterable(made), services.settings.live_s)
    return [
        _one_out(session, comparison, runs, {run.id: places[run.id] for run in runs if run.id in places})
        for comparison, runs in zip(shown, made, strict=True)
    ]


def _one_out(
    session: Session, comparison: Comparison, made: Sequence[Run], places: Mapping[str, QueuePlace]
) -> ComparisonOut:
    version = session.get_one(DatasetVersion, comparison.dataset_version_id)
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
        progress=comparison_progress(comparison, made, places),
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
        model=model_ref(run, version),
        error=problems.stored_problem(run.error),
    )
