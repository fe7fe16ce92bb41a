"""Handles the job `publish`: sends results of a run to MLflow. No other module of the worker uses MLflow's client.

The table `outbox` lists what has not been sent yet. A run never waits for MLflow and never fails because of it. What
MLflow refuses for good is recorded and skipped. A step may be repeated after a crash or a timeout, so each step has the
same effect when it is done twice: MLflow runs are found by their tags, metrics have fixed timestamps, and files are
overwritten.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import structlog
from sqlalchemy import delete
from sqlalchemy.orm import Session

from artifacts.addresses import hide_password
from artifacts.markdown import escaped
from artifacts.run_files import RunFile
from artifacts.store import Digest, Store
from errors import Unavailable
from models import comparison as comparisons
from models import registry
from models import run as runs
from models.comparison import Comparison
from models.dataset import Dataset, DatasetVersion
from models.outbox import Outbox, drop_refusals, get_unsent_rows, record_refusals
from models.registry import ModelVersion
from models.run import Fold, Run, RunArtifact, RunState
from recipes.headline import HEADLINES, Headline, written_numbers
from recipes.recipe import Task, flat
from worker.lease import Complete, Handler, Work

log = structlog.get_logger()

_NOTE = "mlflow.note.content"
# Large files that only the service reads; MLflow does not get them.
_NOT_SHOWN = (RunFile.NEIGHBOURS,)
_OF_A_ROW = {"espalier.best_of", "espalier.difference_to_best", "espalier.p_value"}
# MLflow's limits: characters of an experiment's tag, of a run's tag and of a parameter, and the size of one batch.
_NOTE_CHARACTERS = 20_000
_TAG_CHARACTERS = 8_000
_PARAM_CHARACTERS = 6_000
_PARAMS_AT_ONCE = 100
_METRICS_AT_ONCE = 1_000
_VIEW = "espalier"
_STATUS = {RunState.SUCCEEDED: "FINISHED", RunState.FAILED: "FAILED", RunState.CANCELLED: "KILLED"}


@dataclass(frozen=True)
class TrackingSettings:
    """Settings for sending results to MLflow.

    Attributes:
        url: address of the MLflow server.
        timeout_s: time limit for one call to MLflow, in seconds.
        api_url: address of the Espalier API, for links on MLflow's pages.
    """

    url: str
    timeout_s: float
    api_url: str


@dataclass(frozen=True)
class Facts:
    """Everything in the database about a run that can be sent to MLflow."""

    run: Run
    dataset: Dataset
    version: DatasetVersion
    folds: Sequence[Fold]
    files: Sequence[RunArtifact]
    model_version: ModelVersion | None
    aliases: Sequence[str]
    comparison: Comparison | None
    position: int | None


class Page(Protocol):
    """The page of one run in MLflow. Each method may be called again without changing the result.

    `refusals` lists what MLflow refused for good in these methods, as `what` and `reason`.
    """

    experiment_id: str
    run_id: str
    refusals: list[dict[str, str]]

    def start(self) -> None: ...

    def add_fold(self, number: int) -> None: ...

    def finish(self, store: Store) -> None: ...

    def compare(self, store: Store) -> None: ...

    def add_file(self, store: Store, name: str) -> None: ...

    def move_alias(self, alias: str) -> None: ...


OpenPages = Callable[[TrackingSettings], AbstractContextManager[Callable[[Facts], Page]]]
"""Connects to MLflow and yields a function that returns the page of a run. Tests replace it."""


@contextmanager
def _pages(settings: TrackingSettings) -> Iterator[Callable[[Facts], Page]]:
    with _mlflow(settings) as client:
        yield lambda facts: _Page(client, facts, settings)


class Publish(Handler):
    """Sends the outbox rows of one run to MLflow."""

    def __init__(self, store: Store, settings: TrackingSettings, pages: OpenPages = _pages) -> None:
        self._store = store
        self._settings = settings
        self._pages = pages

    def run(self, work: Work) -> Complete:
        """Send the outbox rows of the run in order, and delete each row once MLflow has it."""
        with work.database.reading() as session:
            rows = get_unsent_rows(session, work.subject_id)
        with self._pages(self._settings) as page_of:
            for row in rows:
                with work.database.reading() as session:
                    facts = _facts(session, work.subject_id)
                try:
                    page = page_of(facts)
                    self._send(row, facts, page)
                except Exception as error:
                    if not _is_final(error):
                        raise
                    log.warning("MLflow refused something", run=facts.run.id, what=row.kind, reason=str(error))
                    work.write(partial(_give_up, row=row, reason=str(error)))
                else:
                    work.write(partial(_settle, row=row, page=page))
                work.report_progress()
        return lambda session: None

    def _send(self, row: Outbox, facts: Facts, page: Page) -> None:
        match row.kind:
            case "started":
                page.start()
            case "fold":
                page.add_fold(row.payload["fold"])
            # If the state is not final, the run was started again, and another row follows at its end.
            case "finished" if facts.run.state.is_final:
                page.finish(self._store)
            case "comparison":
                page.compare(self._store)
            case "file":
                page.add_file(self._store, row.payload["name"])
            case "alias":
                page.move_alias(row.payload["alias"])


def _settle(session: Session, row: Outbox, page: Page) -> None:
    session.execute(delete(Outbox).where(Outbox.id == row.id, Outbox.run_id == row.run_id))
    run = session.get_one(Run, row.run_id)
    run.mlflow_experiment_id, run.mlflow_run_id = page.experiment_id, page.run_id
    if row.kind == "started":
        drop_refusals(session, row.run_id)
    record_refusals(session, row.run_id, page.refusals)


def _give_up(session: Session, row: Outbox, reason: str) -> None:
    """Record that MLflow refused a row for good, and delete the row, so that the next rows are sent."""
    session.execute(delete(Outbox).where(Outbox.id == row.id, Outbox.run_id == row.run_id))
    record_refusals(session, row.run_id, [{"what": row.kind, "reason": reason[:_TAG_CHARACTERS]}])


def _facts(session: Session, run_id: str) -> Facts:
    run = session.get_one(Run, run_id)
    version = session.get_one(DatasetVersion, run.dataset_version_id)
    model_version = registry.find_run_version(session, run_id)
    aliases = registry.get_aliases(session, model_version.model_id) if model_version else {}
    comparison, position = comparisons.find_comparison(session, run_id) or (None, None)
    return Facts(
        run=run,
        dataset=session.get_one(Dataset, version.dataset_id),
        version=version,
        folds=runs.get_folds(session, run_id),
        files=runs.get_artifacts(session, run_id),
        model_version=model_version,
        aliases=aliases.get(model_version.id, []) if model_version else [],
        comparison=comparison,
        position=position,
    )


@contextmanager
def _mlflow(settings: TrackingSettings) -> Iterator[Any]:
    """Yield a client of MLflow. Every MLflow error inside the block becomes Unavailable."""
    # MLflow reads these variables at each call. By default it retries for minutes. Even one retry could create a run
    # twice, if the answer to the first request was lost. MLflow is imported late: the import takes seconds and memory.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(1, round(settings.timeout_s)))
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    import mlflow
    import requests

    try:
        yield mlflow.MlflowClient(tracking_uri=settings.url, registry_uri=settings.url)
    except (mlflow.MlflowException, requests.RequestException) as error:
        told = hide_password(f"MLflow at {settings.url} did not accept a request: {error}")
        raise Unavailable(told) from error


# The error codes with which MLflow rejects the request itself, so that repeating it is useless. After any other error,
# such as one of a proxy or of a server that is away, the same request may succeed later.
# Of what exists already, another worker has just created it: the next attempt finds it.
_FINAL_CODES = ("INVALID_PARAMETER_VALUE",)


def _is_final(error: Exception) -> bool:
    return getattr(error, "error_code", None) in _FINAL_CODES


def mlflow_name(name: str) -> str:
    """Return a name that MLflow accepts for an alias or a logged model: it may contain no dot.

    Names in Espalier have no capital letters, so two different names stay different.
    """
    return name.replace(".", "-DOT-")


def mlflow_alias(alias: str) -> str:
    """Return a name that MLflow accepts for an alias: it reserves `latest`, and `v` with a number."""
    is_reserved = alias == "latest" or re.fullmatch(r"v\d+", alias)
    return f"ALIAS-{alias}" if is_reserved else mlflow_name(alias)


class _Page:
    """The page of one run in MLflow: a parent run with a child run per fold, and the registered model."""

    def __init__(self, client: Any, facts: Facts, settings: TrackingSettings) -> None:
        self._client = client
        self._facts = facts
        self._settings = settings
        self._headline = _headline(facts.run)
        self.refusals: list[dict[str, str]] = []
        self.experiment_id = self._experiment()
        self.run_id = self._run("summary", {})

    # --- steps ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Show the run as running, with its parameters and data set; remove the note of an earlier failure."""
        facts = self._facts
        shown = self._client.get_run(self.run_id)
        if shown.info.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
            if _NOTE in shown.data.tags:
                self._client.delete_tag(self.run_id, _NOTE)
        params = [_param(name, value) for name, value in flat(facts.run.recipe).items()]
        with self._recording("parameters"):
            for start in range(0, len(params), _PARAMS_AT_ONCE):
                self._client.log_batch(self.run_id, params=params[start : start + _PARAMS_AT_ONCE])
        if facts.comparison is not None:
            self._client.set_tag(self.run_id, "espalier.comparison", facts.comparison.id)
        with self._recording("the data set"):
            self._log_dataset()

    def add_fold(self, number: int) -> None:
        """Log the training curves of one fold to MLflow, as a child of the MLflow run of this training."""
        fold = next((fold for fold in self._facts.folds if fold.number == number), None)
        if fold is None:  # the run was started again meanwhile; another outbox row follows for this fold
            return
        run_id = self._run(f"fold-{number + 1}", {"mlflow.parentRunId": self.run_id})
        at = _milliseconds(
            self._facts.run.created_at
        )  # a fixed time, so that sending the metrics again overwrites them
        metrics = [
            _metric(_curve(name), value, at, step)
            for step, epoch in enumerate(fold.history, start=1)
            for name, value in epoch.items()
        ]
        metrics += [
            _metric(f"test/{name}", value, at, 0) for name, value in fold.metrics.items() if isinstance(value, float)
        ]
        with self._recording(f"the curves of fold {number + 1}"):
            for start in range(0, len(metrics), _METRICS_AT_ONCE):
                self._client.log_batch(run_id, metrics=metrics[start : start + _METRICS_AT_ONCE])
        self._client.set_terminated(run_id, "FINISHED")

    def finish(self, store: Store) -> None:
        """Show the end of the run: metrics, files and the registered model, or the error."""
        facts = self._facts
        run = facts.run
        if run.error is not None:
            with self._recording("the error"):
                self._client.set_tag(
                    self.run_id, _NOTE, f"**Failed:** {escaped(run.error['detail'])}"[:_TAG_CHARACTERS]
                )
        if run.metrics is not None:
            at = _milliseconds(run.finished_at)
            summary = _summary(self._headline, run.metrics)
            metrics = [_metric(name, value, at, 0) for name, value in summary.items()]
            with self._recording("the scores"):
                self._client.log_batch(self.run_id, metrics=metrics)
                self._client.set_tag(self.run_id, _NOTE, _note(facts))
            if "features" in run.metrics:
                self._name_choice(run.metrics["features"]["chosen"])
            with self._recording("files"):
                self._log_files(store)
            with self._recording("the model version"):
                self._register()
        self._client.set_terminated(self.run_id, _STATUS[run.state], end_time=_milliseconds(run.finished_at))

    def compare(self, store: Store) -> None:
        """Show the report of the comparison, and how far this run is from the best recipe."""
        comparison = self._facts.comparison
        if comparison is None or comparison.table is None or comparison.report_sha256 is None:
            raise RuntimeError("The outbox names a comparison that has no table. This is a bug.")
        text = store.read(Digest(comparison.report_sha256)).decode()
        with self._recording("the table of the comparison"):
            self._client.log_text(self.run_id, text, "comparison.md")
        row = next(row for row in comparison.table["rows"] if row["position"] == self._facts.position)
        tags = {"espalier.verdict": comparison.table["verdict"][:_TAG_CHARACTERS]}
        if row["difference"] is None:
            tags["espalier.best_of"] = comparison.id
        else:
            tags["espalier.difference_to_best"] = f"{row['difference']['difference']:.6g}"
            tags["espalier.p_value"] = f"{row['difference']['p_value']:.3g}"
        for name, value in tags.items():
            self._client.set_tag(self.run_id, name, value)
        shown = self._client.get_run(self.run_id).data.tags
        for name in shown.keys() & _OF_A_ROW - tags.keys():  # tags of an earlier table
            self._client.delete_tag(self.run_id, name)

    def add_file(self, store: Store, name: str) -> None:
        """Show a file that was computed after the end of the run, such as the picture of a learning curve."""
        with self._recording(f"the file {name}"):
            self._log_artifacts(store, [file for file in self._facts.files if file.name == name])

    def move_alias(self, alias: str) -> None:
        """Set an alias in MLflow too, if it still points to this run's model version in our database."""
        version = self._registered()
        if version is not None and alias in self._facts.aliases:
            self._set_alias(alias, version.version)

    # --- parts ------------------------------------------------------------------------------------------------------

    def _experiment(self) -> str:
        """Return the id of the MLflow experiment of this model. Create it if needed, and update its card."""
        from mlflow.exceptions import RestException

        name = self._facts.run.name
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                experiment_id = str(self._client.create_experiment(name))
            except RestException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._client.get_experiment_by_name(name)  # another worker has just created it
        if experiment is not None:
            experiment_id = str(experiment.experiment_id)
            if experiment.lifecycle_stage == "deleted":
                self._client.restore_experiment(experiment_id)
        tags = {
            _NOTE: _card(self._facts, self._settings.api_url),
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.experiment.primaryMetric.name": f"cv/{self._headline.metric}",
            "mlflow.experiment.primaryMetric.greaterIsBetter": str(self._headline.is_greater_better),
            f"mlflow.sharedViewState.{_VIEW}": json.dumps(_shared_view(self._headline)),
        }
        known = experiment.tags if experiment is not None else {}
        for key, value in tags.items():
            if known.get(key) != value:
                self._client.set_experiment_tag(experiment_id, key, value)
        return experiment_id

    def _run(self, part: str, tags: dict[str, str]) -> str:
        """Return the id of the MLflow run for `part` (`summary`, `fold-1`, …); create the run if needed."""
        run = self._facts.run
        query = f"tags.`espalier.run` = '{run.id}' and tags.`espalier.fold` = '{part}'"
        found = self._client.search_runs([self.experiment_id], query, max_results=1)
        if found:
            return str(found[0].info.run_id)
        mine = {"espalier.run": run.id, "espalier.fold": part, "mlflow.source.name": "espalier"}
        name = _name(run) if part == "summary" else f"{_name(run)}-{part}"
        created = self._client.create_run(
            self.experiment_id,
            start_time=_milliseconds(run.started_at or run.created_at),
            tags={**mine, **tags},
            run_name=name,
        )
        return str(created.info.run_id)

    def _name_choice(self, chosen: dict[str, Any]) -> None:
        """Show the backbone and layer that `auto` chose, as tags: MLflow parameters cannot be changed."""
        self._client.update_run(self.run_id, name=_name(self._facts.run, chosen))
        for part in ("backbone", "features_from"):
            self._client.set_tag(self.run_id, f"espalier.{part}", chosen[part])

    def _log_dataset(self) -> None:
        import mlflow.data.meta_dataset
        from mlflow.data.http_dataset_source import HTTPDatasetSource
        from mlflow.entities import DatasetInput, InputTag

        facts = self._facts
        source: Any = HTTPDatasetSource(f"{self._settings.api_url}/api/v1/datasets/{facts.dataset.id}")  # type: ignore[no-untyped-call]
        digest = (facts.version.manifest_sha256 or "")[:36]
        name = f"{facts.dataset.name} v{facts.version.number}"
        data: Any = mlflow.data.meta_dataset.MetaDataset(source, name, digest)  # type: ignore[abstract]
        context = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(self.run_id, [DatasetInput(data._to_mlflow_entity(), [context])])

    def _log_files(self, store: Store) -> None:
        shown = [file for file in self._facts.files if file.name not in _NOT_SHOWN]
        self._log_artifacts(store, sorted(shown, key=lambda file: file.name != RunFile.REPORT))
        self._client.log_dict(self.run_id, self._facts.run.recipe, "recipe.json")
        per_class = (self._facts.run.metrics or {}).get("per_class")
        if per_class:
            # The same format as `log_table`, which would append to the table if it were called again.
            columns = ["label", "precision", "recall", "f1", "images"]
            rows = [[row[column] for column in columns] for row in per_class]
            self._client.log_dict(self.run_id, {"columns": columns, "data": rows}, "per_class.json")
            logged = json.dumps([{"path": "per_class.json", "type": "table"}])
            self._client.set_tag(self.run_id, "mlflow.loggedArtifacts", logged)

    def _log_artifacts(self, store: Store, files: Sequence[RunArtifact]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for file in files:
                path = Path(folder) / file.name
                path.write_bytes(store.read(Digest(file.sha256)))
                self._client.log_artifact(self.run_id, str(path))

    def _register(self) -> None:
        """Register the model version in MLflow too, with its aliases."""
        from mlflow.exceptions import RestException

        version = self._facts.model_version
        if version is None:
            return
        name = self._facts.run.name
        try:
            self._client.create_registered_model(name)
        except RestException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        registered = self._registered()
        if registered is None:
            model_id = self._logged_model(version)
            registered = self._client.create_model_version(
                name,
                source=f"models:/{model_id}",
                run_id=self.run_id,
                tags={"espalier.version": str(version.number), "espalier.run": version.run_id},
                model_id=model_id,
                await_creation_for=0,  # there is no file to wait for
            )
        for alias in self._facts.aliases:
            self._set_alias(alias, registered.version)

    def _set_alias(self, alias: str, version: str) -> None:
        with self._recording(f"the alias {alias}"):
            self._client.set_registered_model_alias(self._facts.run.name, mlflow_alias(alias), version)

    @contextmanager
    def _recording(self, what: str) -> Iterator[None]:
        """Record what MLflow refuses for good, and go on with the rest."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if not _is_final(error):
                raise
            log.warning("MLflow refused something", run=self._facts.run.id, what=what, reason=str(error))
            self.refusals.append({"what": what, "reason": str(error)[:_TAG_CHARACTERS]})

    def _registered(self) -> Any:
        """Return the version in MLflow's registry for this run's model version, or None if it is not registered yet."""
        version = self._facts.model_version
        if version is None:
            return None
        found = self._client.search_model_versions(f"name = '{self._facts.run.name}' and run_id = '{self.run_id}'")
        return found[0] if found else None

    def _logged_model(self, version: ModelVersion) -> str:
        """Return the id of the logged model in MLflow; create it if needed.

        The logged model has no weights: its code (`registered_model.py`) asks the Espalier API.
        """
        import mlflow.pyfunc
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema

        name = self._facts.run.name
        shown = f"{mlflow_name(name)}-v{version.number}"
        query = f"name = '{shown}' and tags.`espalier.run` = '{version.run_id}'"
        found = self._client.search_logged_models([self.experiment_id], query, max_results=1)
        model = (
            found[0]
            if found
            else self._client.create_logged_model(
                self.experiment_id,
                name=shown,
                source_run_id=self.run_id,
                tags={"espalier.run": version.run_id, "espalier.bundle": version.bundle_sha256},
                params={key: str(value) for key, value in flat(self._facts.run.recipe).items()},
                model_type="regressor" if self._facts.run.recipe["task"] == Task.REGRESSION else "classifier",
            )
        )
        with tempfile.TemporaryDirectory() as folder:
            mlflow.pyfunc.save_model(
                Path(folder) / "model",
                python_model=str(Path(__file__).with_name("registered_model.py")),
                model_config={"url": self._settings.api_url, "model": name, "version": version.number},
                signature=ModelSignature(inputs=Schema([ColSpec("binary", "image")])),
                pip_requirements=[f"mlflow=={mlflow.__version__}"],
            )
            self._client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
        self._client.finalize_logged_model(model.model_id, "READY")
        outputs = self._client.get_run(self.run_id).outputs
        if outputs is None or not outputs.model_outputs:  # MLflow refuses to log the same output twice
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        return str(model.model_id)


# --- texts -----------------------------------------------------------------------------------------------------------


def _name(run: Run, chosen: dict[str, Any] | None = None) -> str:
    """Return the name of a run in MLflow, such as `vgg16-block3-extraction-5fold-a1b2`.

    `chosen` has the backbone and layer that `auto` chose, or is None.
    """
    recipe = run.recipe | (chosen or {})
    mode = recipe["mode"].split("-")[-1]
    network = recipe.get("network")
    what = network["kind"] if network else f"{recipe['backbone']}-{recipe['features_from'] or 'last'}"
    return f"{what}-{mode}-{recipe['folds']['k']}fold-{run.id[-4:]}"


def _card(facts: Facts, api_url: str) -> str:
    """Return a description of the data set, as Markdown for the page of the experiment."""
    version = facts.version
    lines = [
        f"# {escaped(facts.dataset.name)}",
        "",
        f"{version.images:,} images, version {version.number}, {version.task.value if version.task else ''}; "
        f"{version.duplicates:,} duplicates, {version.refused_total:,} refused.",
        "",
        f"[Data set]({api_url}/api/v1/datasets/{facts.dataset.id}) · [API]({api_url}/docs) · "
        f"[runs with their scores](?viewStateShareKey={_VIEW})",
        "",
        *_contents(version),
    ]
    return "\n".join(lines)[:_NOTE_CHARACTERS]


def _contents(version: DatasetVersion) -> list[str]:
    """Return the classes with their numbers of images, or the range of the numbers, as lines of Markdown."""
    if version.target is not None:
        low, high, mean = written_numbers(*(version.target[name] for name in ("min", "max", "mean")))
        return [f"Numbers from {low} to {high}, mean {mean}."]
    counts = (f"| {escaped(count.name)} | {count.images:,} |" for count in version.class_counts)
    return ["| class | images |", "|---|--:|", *counts]


def _headline(run: Run) -> Headline:
    return HEADLINES[Task(run.recipe["task"])]


def _note(facts: Facts) -> str:
    metrics = facts.run.metrics or {}
    is_better = metrics.get("baseline", {}).get("is_better", True)
    bad = "" if is_better else "**This model is no better than a constant answer that ignores the image.** "
    return (
        f"{bad}**{_headline(facts.run).sentence(metrics)}**, out of fold on {escaped(facts.dataset.name)} "
        f"version {facts.version.number}. See `report.md` under Artifacts."
    )


def _shared_view(headline: Headline) -> dict[str, Any]:
    """Return the initial state of MLflow's table of runs: no folds, best score first."""
    return {
        "searchFilter": "tags.`espalier.fold` = 'summary'",
        "orderByKey": f"metrics.`cv/{headline.metric}`",
        "orderByAsc": not headline.is_greater_better,
        "groupBy": None,
        "selectedColumns": [
            "attributes.`Source`",
            f"metrics.`cv/{headline.metric}`",
            f"metrics.`cv/{headline.metric}_low`",
            f"metrics.`cv/{headline.metric}_high`",
            "params.`backbone`",
            "params.`features_from`",
            "params.`weights`",
            "tags.`espalier.backbone`",
            "tags.`espalier.features_from`",
        ],
    }


def _summary(headline: Headline, metrics: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of the parent run. They are few, so that MLflow's page loads quickly."""
    summary = {f"cv/{name}": value for name, value in metrics.items() if isinstance(value, float)}
    bounds = headline.interval(metrics)
    summary[f"cv/{headline.metric}_low"], summary[f"cv/{headline.metric}_high"] = bounds
    if "test" in metrics:
        summary |= {f"test/{name}": value for name, value in metrics["test"].items() if isinstance(value, float)}
    return summary


def _curve(name: str) -> str:
    return f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"


def _param(name: str, value: Any) -> Any:
    from mlflow.entities import Param

    return Param(name, str(value)[:_PARAM_CHARACTERS])


def _metric(name: str, value: float, timestamp_ms: int, step: int) -> Any:
    from mlflow.entities import Metric

    return Metric(name, value, timestamp_ms, step)


def _milliseconds(moment: datetime | None) -> int:
    return int(moment.timestamp() * 1000) if moment is not None else 0
