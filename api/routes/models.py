"""Routes of models, their versions and aliases. The prediction route is in `api.routes.predictions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path
from sqlalchemy.orm import Session

from api.bodies import JsonRoute
from api.dependencies import PrincipalDep, ServicesDep
from api.filters import DatasetQuery, NameQuery, filtered_versions
from api.paging import CursorQuery, LimitQuery, next_cursor, page_request
from api.schemas import AliasOut, AliasRequest, ModelOut, ModelVersionOut, Number, Page
from artifacts.store import Digest
from models import registry
from models import run as runs
from models.dataset import DatasetVersion
from models.outbox import add_to_outbox
from models.paging import PageRequest
from models.registry import Model, ModelVersion
from models.run import Run
from recipes.recipe import NAME_PATTERN

router = APIRouter(prefix="/api/v1/models", tags=["models"], route_class=JsonRoute)

# Versions that a model shows by itself; the route of versions pages through all of them.
VERSIONS_SHOWN = 50

AliasName = Annotated[str, Path(pattern=NAME_PATTERN)]


@router.get("")
def list_models(
    services: ServicesDep,
    principal: PrincipalDep,
    limit: LimitQuery = 50,
    cursor: CursorQuery = None,
    dataset: DatasetQuery = None,
    name: NameQuery = None,
) -> Page[ModelOut]:
    """List models, the newest first, each with its newest versions: all, or those of a name or of a data set.

    A model is of a data set if any of its versions was trained on it.
    """
    with services.database.reading() as session:
        versions = filtered_versions(session, principal, dataset)
        page = registry.list_models(session, principal, page_request(limit, cursor), name, versions)
        return Page(items=[_model_out(session, model) for model in page.rows], next_cursor=next_cursor(page.next_after))


@router.get("/{name}")
def get_model(services: ServicesDep, principal: PrincipalDep, name: str) -> ModelOut:
    """Show a model with all its aliases and its newest versions. `GET …/versions` lists all versions."""
    with services.database.reading() as session:
        return _model_out(session, registry.get_model(session, principal, name))


@router.get("/{name}/versions")
def list_versions(
    services: ServicesDep, principal: PrincipalDep, name: str, limit: LimitQuery = 50, cursor: CursorQuery = None
) -> Page[ModelVersionOut]:
    """List the versions of a model, the newest first; their metrics leave out `confusion` and `per_class`."""
    with services.database.reading() as session:
        model = registry.get_model(session, principal, name)
        page = registry.list_versions(session, model.id, page_request(limit, cursor))
        return Page(items=_versions_out(session, model, page.rows), next_cursor=next_cursor(page.next_after))


@router.get("/{name}/versions/{version}")
def get_version(services: ServicesDep, principal: PrincipalDep, name: str, version: Number) -> ModelVersionOut:
    """Show one version of a model, with the recipe and the metrics of its run."""
    with services.database.reading() as session:
        model = registry.get_model(session, principal, name)
        found = registry.get_model_version(session, model, version)
        run = session.get_one(Run, found.run_id)
        data = session.get_one(DatasetVersion, run.dataset_version_id)
        aliases = registry.get_aliases(session, model.id).get(found.id, [])
        return _version_out(found, run, run.metrics, data, aliases)


@router.put("/{name}/aliases/{alias}")
def move_alias(
    services: ServicesDep, principal: PrincipalDep, name: str, alias: AliasName, body: AliasRequest
) -> AliasOut:
    """Make an alias of a model point to another version. The alias is created if it does not exist.

    The request is refused if files of the version are missing or damaged. If its backbone must be loaded first, the
    response has `serving: old`, and the previous version answers until the backbone is loaded.
    """
    with services.database.reading() as session:
        model = registry.get_model(session, principal, name)
        version = registry.get_model_version(session, model, body.version)
    bundle = Digest(version.bundle_sha256)
    if services.shelf.predictor_if_warm(bundle, Digest(version.backbone_sha256)) is None:
        services.shelf.check_files(bundle)
    with services.database.writing() as session:
        registry.move_alias(session, model, alias, version)
        add_to_outbox(session, version.run_id, "alias", {"alias": alias})
    is_served = services.version_resolver.serves(principal, name, alias, version.number)
    return AliasOut(model=name, alias=alias, version=version.number, serving="new" if is_served else "old")


def _model_out(session: Session, model: Model) -> ModelOut:
    newest = registry.list_versions(session, model.id, PageRequest(VERSIONS_SHOWN)).rows
    return ModelOut(
        name=model.name,
        versions=_versions_out(session, model, newest),
        versions_total=registry.count_versions(session, model.id),
        aliases=registry.get_alias_numbers(session, model.id),
        created_at=model.created_at,
    )


def _versions_out(session: Session, model: Model, versions: Sequence[ModelVersion]) -> list[ModelVersionOut]:
    """Return the versions of a model without the tables of their metrics."""
    made_by = runs.get_brief_runs(session, [version.run_id for version in versions])
    metrics = runs.get_brief_metrics(session, made_by)
    aliases = registry.get_aliases(session, model.id)
    found = []
    for version in versions:
        run = made_by[version.run_id]
        data = session.get_one(DatasetVersion, run.dataset_version_id)
        found.append(_version_out(version, run, metrics[run.id], data, aliases.get(version.id, [])))
    return found


def _version_out(
    version: ModelVersion, run: Run, metrics: dict[str, Any] | None, data: DatasetVersion, aliases: list[str]
) -> ModelVersionOut:
    return ModelVersionOut(
        version=version.number,
        run=run.id,
        dataset=data.dataset_id,
        dataset_version=data.number,
        recipe=run.recipe,
        metrics=metrics or {},
        bundle=version.bundle_sha256,
        backbone=version.backbone_sha256,
        aliases=aliases,
        created_at=version.created_at,
    )
