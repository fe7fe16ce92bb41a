"""Models, their versions and aliases; exported backbones, and the weights they were built from. Reads no file.

Every transaction that changes a version or an alias increments the number in the table `registry_revision`. A process
that serves predictions reads only that number to learn whether anything has changed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, String, UniqueConstraint, func, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from artifacts.store import Digest
from errors import NoChampion, NotFound
from models.base import Base, new_id, now, text_enum
from models.paging import PageRequest, RowPage, fetch_records
from models.project import Principal, owner, scope
from models.run import Run
from recipes.catalogue import BackboneName

CHAMPION = "champion"


class Model(Base):
    """A model: the name under which clients ask for predictions. The trained networks are its versions."""

    __tablename__ = "model"
    __table_args__ = (UniqueConstraint("project_id", "name"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True, default=lambda: new_id("mdl"))
    project_id: Mapped[str] = owner()
    name: Mapped[str] = mapped_column(String(63))
    created_at: Mapped[datetime] = mapped_column(default=now)


class ModelVersion(Base):
    """A numbered version of a model: the result of one run. It never changes."""

    __tablename__ = "model_version"
    __table_args__ = (UniqueConstraint("model_id", "number"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True, default=lambda: new_id("mdv"))
    model_id: Mapped[str] = mapped_column(ForeignKey("model.id"))
    number: Mapped[int]
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), unique=True)
    bundle_sha256: Mapped[str] = mapped_column(String(64), index=True)
    backbone_sha256: Mapped[str] = mapped_column(String(64), index=True)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Alias(Base):
    """A name for one version of a model, such as `champion`. It can be moved to another version."""

    __tablename__ = "alias"

    model_id: Mapped[str] = mapped_column(ForeignKey("model.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("model_version.id"))
    moved_at: Mapped[datetime] = mapped_column(default=now)


class RegistryRevision(Base):
    """The table's only row. Every change of a model version or an alias increments `revision`."""

    __tablename__ = "registry_revision"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    revision: Mapped[int] = mapped_column(BigInteger, default=0)


class Backbone(Base):
    """A backbone that was exported to a file: one for each network, weights, cut point, size and export version.

    Two exports of the same backbone differ in their bytes. Only the first is kept, so that models share its file.
    """

    __tablename__ = "backbone"
    __table_args__ = (UniqueConstraint("network", "weights_sha256", "cut", "size", "export_version"),)

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    network: Mapped[BackboneName] = mapped_column(text_enum(BackboneName))
    weights_sha256: Mapped[str] = mapped_column(String(64))
    cut: Mapped[str] = mapped_column(String(32))
    size: Mapped[int]
    export_version: Mapped[int]
    manifest: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class QuantisedBackbone(Base):
    """An int8 copy of an exported backbone, for one image rule.

    The copy is calibrated on the first data set that needs it. Later data sets use the same copy, so that models share
    it. If a client asks for a new calibration, the new copy gets the next `generation`. `manifest` names the images
    that were used for calibration.
    """

    __tablename__ = "quantised"
    __table_args__ = (UniqueConstraint("backbone_sha256", "image_rule", "generation"),)

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    backbone_sha256: Mapped[str] = mapped_column(String(64))
    image_rule: Mapped[int]
    generation: Mapped[int]
    manifest: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class Weights(Base):
    """Weights of a network that are in the store. `source` says where they came from."""

    __tablename__ = "weights"

    network: Mapped[BackboneName] = mapped_column(text_enum(BackboneName), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    source: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


# --- models --------------------------------------------------------------------------------------------------------


def get_model(session: Session, principal: Principal, name: str) -> Model:
    """Return the model with this name. Raises NotFound."""
    model = session.scalar(select(Model).where(Model.name == name, scope(Model.project_id, principal)))
    if model is None:
        raise NotFound(f"No model is named {name!r}. GET /api/v1/models lists all models.")
    return model


def list_models(
    session: Session,
    principal: Principal,
    page: PageRequest,
    name: str | None = None,
    dataset_versions: Collection[str] | None = None,
) -> RowPage[Model]:
    """Return one page of the models, the newest first: all, or those of a name or with a version of these data sets."""
    query = select(Model).where(scope(Model.project_id, principal))
    if name is not None:
        query = query.where(Model.name == name)
    if dataset_versions is not None:
        made = select(ModelVersion.model_id).join(Run, Run.id == ModelVersion.run_id)
        query = query.where(Model.id.in_(made.where(Run.dataset_version_id.in_(dataset_versions))))
    return fetch_records(session, query, Model.id, page)


def get_model_version(session: Session, model: Model, number: int) -> ModelVersion:
    """Return a version of a model by its number. Raises NotFound."""
    query = select(ModelVersion).where(ModelVersion.model_id == model.id, ModelVersion.number == number)
    version = session.scalar(query)
    if version is None:
        raise NotFound(f"Model {model.name!r} has no version {number}.")
    return version


def get_alias(session: Session, model: Model, alias: str) -> ModelVersion:
    """Return the version to which an alias of a model points. Raises NotFound, or NoChampion for a missing champion."""
    query = (
        select(ModelVersion)
        .join(Alias, Alias.version_id == ModelVersion.id)
        .where(Alias.model_id == model.id, Alias.name == alias)
    )
    version = session.scalar(query)
    if version is None and alias == CHAMPION:
        newest = get_model_versions(session, model.id)[0].number
        raise NoChampion(
            f"Model {model.name!r} has no champion: none of its versions is better than a constant answer, so none "
            f"became it by itself. To use version {newest} all the same, PUT "
            f'/api/v1/models/{model.name}/aliases/champion with {{"version": {newest}}}, or add ?version={newest} to '
            "the request. Or train a better version.",
            version=newest,
        )
    if version is None:
        raise NotFound(f"Model {model.name!r} has no alias {alias!r}.")
    return version


def get_model_versions(session: Session, model_id: str) -> Sequence[ModelVersion]:
    """Return every version of a model, the newest first."""
    query = select(ModelVersion).where(ModelVersion.model_id == model_id)
    return session.scalars(query.order_by(ModelVersion.number.desc())).all()


def list_versions(session: Session, model_id: str, page: PageRequest) -> RowPage[ModelVersion]:
    """Return one page of the versions of a model, the newest first."""
    return fetch_records(session, select(ModelVersion).where(ModelVersion.model_id == model_id), ModelVersion.id, page)


def count_versions(session: Session, model_id: str) -> int:
    """Return the number of versions of a model."""
    return session.scalar(select(func.count()).where(ModelVersion.model_id == model_id)) or 0


def get_alias_numbers(session: Session, model_id: str) -> dict[str, int]:
    """Return the aliases of a model, each with the number of the version that it points at."""
    query = select(Alias.name, ModelVersion.number).join(ModelVersion, ModelVersion.id == Alias.version_id)
    rows = session.execute(query.where(Alias.model_id == model_id).order_by(Alias.name))
    return dict(rows.all())


def find_run_version(session: Session, run_id: str) -> ModelVersion | None:
    """Return the model version that a run produced, or None."""
    return session.scalar(select(ModelVersion).where(ModelVersion.run_id == run_id))


def get_run_versions(session: Session, run_ids: Sequence[str]) -> dict[str, ModelVersion]:
    """Return the model versions that runs produced, by run id."""
    query = select(ModelVersion).where(ModelVersion.run_id.in_(run_ids))
    return {version.run_id: version for version in session.scalars(query)}


def get_aliases(session: Session, model_id: str) -> dict[str, list[str]]:
    """Return the names of a model's aliases, as a list for each version id to which aliases point."""
    aliases: dict[str, list[str]] = {}
    for alias in session.scalars(select(Alias).where(Alias.model_id == model_id).order_by(Alias.name)):
        aliases.setdefault(alias.version_id, []).append(alias.name)
    return aliases


def get_all_aliases(session: Session) -> list[tuple[Model, str, ModelVersion]]:
    """Return every alias of every model, as (model, name of the alias, version to which it points)."""
    query = (
        select(Model, Alias.name, ModelVersion)
        .join(Alias, Alias.model_id == Model.id)
        .join(ModelVersion, ModelVersion.id == Alias.version_id)
    )
    return [(model, name, version) for model, name, version in session.execute(query)]


def get_revision(session: Session) -> int:
    """Return the registry's revision, which grows with every change of a version or an alias."""
    return session.scalars(select(RegistryRevision.revision)).one()


def add_model_version(
    session: Session,
    principal: Principal,
    name: str,
    run_id: str,
    bundle: Digest,
    backbone: Digest,
    *,
    can_be_champion: bool = True,
) -> ModelVersion:
    """Add the result of a run as the next version of a model, and the model if it is new.

    If the model has no champion and `can_be_champion` is true, the alias `champion` points to this version.
    """
    _count_revision(session)  # locks the revision's row, so that two runs cannot get the same version number
    model = session.scalar(select(Model).where(Model.name == name, scope(Model.project_id, principal)))
    if model is None:
        model = Model(project_id=principal.project_id, name=name)
        session.add(model)
        session.flush()
    versions = get_model_versions(session, model.id)
    version = ModelVersion(
        model_id=model.id,
        number=versions[0].number + 1 if versions else 1,
        run_id=run_id,
        bundle_sha256=bundle,
        backbone_sha256=backbone,
    )
    session.add(version)
    session.flush()
    if can_be_champion and session.get(Alias, (model.id, CHAMPION)) is None:
        session.add(Alias(model_id=model.id, name=CHAMPION, version_id=version.id))
    return version


def move_alias(session: Session, model: Model, alias: str, version: ModelVersion) -> None:
    """Make an alias of a model point to a version of that model. An alias that does not exist is created."""
    _count_revision(session)
    session.merge(Alias(model_id=model.id, name=alias, version_id=version.id, moved_at=now()))


def _count_revision(session: Session) -> None:
    session.execute(update(RegistryRevision).values(revision=RegistryRevision.revision + 1))


# --- backbones and weights -----------------------------------------------------------------------------------------


def find_backbone(
    session: Session, network: BackboneName, weights: Digest, cut: str, size: int, export_version: int
) -> Backbone | None:
    """Return the exported backbone for a network, its weights, cut point and image size; None if none exists yet."""
    return session.scalar(
        select(Backbone).where(
            Backbone.network == network,
            Backbone.weights_sha256 == weights,
            Backbone.cut == cut,
            Backbone.size == size,
            Backbone.export_version == export_version,
        )
    )


def add_backbone(session: Session, backbone: Backbone) -> Backbone:
    """Add an exported backbone, unless the same backbone was exported before; return the stored one."""
    _count_revision(session)  # locks the revision's row, so that a second writer sees the first one's backbone
    key = (backbone.network, Digest(backbone.weights_sha256), backbone.cut, backbone.size, backbone.export_version)
    existing = find_backbone(session, *key)
    if existing is not None:
        return existing
    return session.merge(backbone)


def find_quantised_backbone(session: Session, backbone: Digest, image_rule: int) -> QuantisedBackbone | None:
    """Return the newest int8 copy of a backbone for an image rule, or None if there is none yet."""
    query = select(QuantisedBackbone).where(
        QuantisedBackbone.backbone_sha256 == backbone, QuantisedBackbone.image_rule == image_rule
    )
    return session.scalar(query.order_by(QuantisedBackbone.generation.desc()).limit(1))


def add_quantised_backbone(
    session: Session,
    backbone: Digest,
    image_rule: int,
    digest: Digest,
    manifest: dict[str, Any],
    *,
    is_anew: bool = False,
) -> QuantisedBackbone:
    """Add an int8 copy of a backbone, unless there is one already; return the copy to use.

    With `is_anew`, the new copy is added even if there is one, and becomes the newest generation.
    """
    _count_revision(session)  # locks the revision's row, so that a second writer sees the first one's copy
    newest = find_quantised_backbone(session, backbone, image_rule)
    if newest is not None and (not is_anew or newest.sha256 == digest):
        return newest
    generation = newest.generation + 1 if newest else 1
    return session.merge(  # not `add`: an older generation may have the same bytes, and then becomes the newest
        QuantisedBackbone(
            sha256=digest,
            backbone_sha256=backbone,
            image_rule=image_rule,
            generation=generation,
            manifest=manifest,
        )
    )


def find_weights(session: Session, network: BackboneName, name: str) -> Weights | None:
    """Return the weights of a network that are stored under this name, or None."""
    return session.get(Weights, (network, name))


def get_weights_digests(session: Session) -> dict[tuple[BackboneName, str], str]:
    """Return the digests of all stored weights, by (network, name of the weights)."""
    return {(row.network, row.name): row.sha256 for row in session.scalars(select(Weights))}


def find_weights_by_name(session: Session, name: str) -> list[Weights]:
    """Return the weights that are stored under this name, one for each network that has such weights."""
    return list(session.scalars(select(Weights).where(Weights.name == name).order_by(Weights.network)))


def set_weights(session: Session, weights: Weights) -> None:
    """Record weights that were stored. They replace weights of the same network and name."""
    session.merge(weights)
