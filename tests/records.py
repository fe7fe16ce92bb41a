"""Database rows for tests: data sets, runs, folds and comparisons in a given state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from artifacts.images import ImageFacts
from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.store import Digest, digest_of
from models import comparison as comparisons
from models import dataset as datasets
from models import job as jobs
from models import run as runs
from models.base import Base
from models.comparison import Comparison
from models.dataset import Dataset, DatasetVersion, IngestedImage
from models.job import Job, JobKind, Queue
from models.project import Principal
from models.run import Fold, Run
from recipes.defaults import ClassCount
from recipes.recipe import Recipe, Task

PRINCIPAL = Principal()
RECIPE = Recipe(task=Task.BINARY)


def digest(name: str) -> Digest:
    """Return a digest that is the same for the same name."""
    return digest_of(name.encode())


def accepted(path: str, content: str | None = None, label: str = "daisy") -> IngestedImage:
    """Return an image as ingest writes it. Images with the same `content` have the same digest."""
    row = Row(path, digest(content or path), (label,), None, None, Split.TRAIN)
    return IngestedImage(row, ImageFacts(40, 30, "PNG"), 123)


def waiting_version(session: Session, name: str = "flowers") -> DatasetVersion:
    """Add a data set whose first version waits for its ingest."""
    dataset = datasets.create_dataset(session, PRINCIPAL, name)
    return datasets.add_version(session, dataset, digest(f"archive of {name}"))


def queue_ingest(session: Session, archive: Digest, name: str = "flowers") -> str:
    """Add a version to a data set, create the data set if needed, and queue its ingest; return the version's id."""
    query = select(Dataset).where(Dataset.name == name, Dataset.deleted_at.is_(None))
    dataset = session.scalar(query) or datasets.create_dataset(session, PRINCIPAL, name)
    version = datasets.add_version(session, dataset, archive)
    jobs.add_job(session, dataset.project_id, JobKind.INGEST, Queue.INGEST, version.id)
    return version.id


def make_ready(session: Session, version: DatasetVersion, images: Sequence[IngestedImage] = ()) -> DatasetVersion:
    """Make a waiting version ready, with these images."""
    datasets.start_ingest(session, version.id)
    datasets.add_images(session, PRINCIPAL.project_id, version.id, images)
    datasets.mark_ready(
        session,
        version.id,
        manifest=digest(f"manifest of {version.id}"),
        task=Task.BINARY,
        images=len(images),
        duplicates=0,
        ignored=0,
        classes=[ClassCount("daisy", 10, 10), ClassCount("rose", 10, 10)],
        target=None,
        refused=[],
    )
    session.flush()
    return version


def ready_version(session: Session, name: str = "flowers", images: Sequence[IngestedImage] = ()) -> DatasetVersion:
    """Add a data set whose first version can be trained on."""
    return make_ready(session, waiting_version(session, name), images)


def dataset_of(session: Session, version: DatasetVersion) -> Dataset:
    """Return the data set that a version belongs to."""
    return session.get_one(Dataset, version.dataset_id)


def queued_run(session: Session, version: DatasetVersion, name: str = "flowers") -> Run:
    """Add a run that waits."""
    return runs.create_run(session, PRINCIPAL, version.id, name, RECIPE)


def running_run(session: Session, version: DatasetVersion, name: str = "flowers") -> Run:
    """Add a run that is under way."""
    return runs.start_run(session, queued_run(session, version, name).id)


def fold(run_id: str, number: int = 0, **values: Any) -> Fold:
    """Return a fold of a run with typical results."""
    measured = {"epochs": 9, "best_epoch": 4, "stopped": "", "metrics": {"loss": 1.0}, "history": []}
    return Fold(run_id=run_id, number=number, **measured | values)


def queued_comparison(session: Session, version: DatasetVersion, recipes: int = 2) -> Comparison:
    """Add a comparison with queued runs, whose recipes differ in the number of epochs."""
    chosen = [RECIPE.model_copy(update={"epochs": number + 1}) for number in range(recipes)]
    return comparisons.create_comparison(session, PRINCIPAL, version.id, "flowers", chosen)[0]


def job_of(session: Session, subject_id: str) -> Job:
    """Return the one job about a subject."""
    return session.scalars(select(Job).where(Job.subject_id == subject_id)).one()


def count(session: Session, record: type[Base]) -> int:
    """Return how many rows of a record there are."""
    return session.scalar(select(func.count()).select_from(record)) or 0


def claim_next(session: Session, queues: Sequence[Queue], owner: str) -> Job | None:
    """Claim the first due job of these queues, as a worker does when it receives the message; None if none is due."""
    for queue in queues:
        for job_id, _ in jobs.due_jobs(session, queue, 1000):
            job = jobs.claim(session, job_id, [queue], owner)
            if job is not None:
                return job
    return None
