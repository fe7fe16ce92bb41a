"""What MLflow receives: against a real server that is unavailable, loses answers, or gets the same request twice."""

from __future__ import annotations

import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import mlflow
import pytest
import records
from running import ROOT, free_port
from sqlalchemy import select
from sqlalchemy.orm import Session
from waiting import until
from working import StartLoop, add_job, claimed_work, look, make_due, settled

from artifacts.store import Store, digest_of
from errors import Crashed, Unavailable
from models import comparison as comparisons
from models import job as jobs
from models import registry, run_jobs
from models import run as runs
from models.comparison import Comparison, ComparisonRun, ComparisonState
from models.dataset import DatasetVersion
from models.job import Job, JobKind, JobState, Queue
from models.outbox import Outbox, add_publish_jobs, add_to_outbox, get_refusals, get_unsent_rows
from models.run import Fold, Run
from models.session import Database
from ops.up import command_line, mlflow_answers, mlflow_server
from worker.handlers.tracking import Publish, TrackingSettings


class LossyRelay:
    """Stands before MLflow; loses every answer from that to a certain change on.

    Only changes count: where the answer to a question is lost, nothing was done that could be done twice.
    """

    def __init__(self, target: str) -> None:
        self.loses_from: int | None = None
        self.refused_path: str | None = None
        self.hidden_path: str | None = None
        self.changes = 0
        self._client = client = httpx2.Client(timeout=120, trust_env=False)  # one for all: making one takes longer
        relay = self

        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                relay.changes += self.command != "GET" and not self.path.endswith("/search")
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if relay.refused_path is not None and self.path.endswith(relay.refused_path):
                    self._say(400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "Not like this."}')
                    return
                if relay.hidden_path is not None and relay.hidden_path in self.path:
                    relay.hidden_path = None  # created by somebody else just after this question
                    self._say(404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Not yet."}')
                    return
                headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host",)}
                answer = client.request(self.command, target + self.path, content=body, headers=headers)
                if relay.loses_from is not None and relay.changes >= relay.loses_from:
                    self.close_connection = True  # MLflow did it, and nobody hears so
                    return
                self._say(answer.status_code, answer.content, answer.headers.get("content-type", "application/json"))

            def _say(self, status: int, body: bytes, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

            def log_message(self, *_: Any) -> None:
                """Say nothing: thousands of lines."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._client.close()


@pytest.fixture(scope="module")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real MLflow server of this module."""
    port = free_port()
    folder = tmp_path_factory.mktemp("mlflow")
    server = subprocess.Popen(command_line(mlflow_server(port, folder), folder), cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    until(lambda: mlflow_answers(url), within_s=180)
    yield url
    server.terminate()
    server.wait(60)


@pytest.fixture
def relay(mlflow_url: str) -> Iterator[LossyRelay]:
    relay = LossyRelay(mlflow_url)
    yield relay
    relay.close()


METRICS = {
    "accuracy": 0.75,
    "accuracy_ci95": [0.5, 0.9],
    "loss": 0.6,
    "per_class": [{"label": "daisy", "precision": 0.7, "recall": 0.8, "f1": 0.75, "images": 10}],
}


@dataclass
class Case:
    """A finished run of which MLflow knows nothing yet, and the job that tells it."""

    database: Database
    store: Store
    run_id: str
    name: str

    def publish(self, url: str) -> None:
        """Do the job once. Raises Unavailable."""
        add_job(self.database, self.run_id, JobKind.PUBLISH, Queue.TRACKING)
        with claimed_work(self.database) as work:
            try:
                Publish(self.store, _settings(url)).run(work)
            finally:
                work.write(lambda session: jobs.finish(session, work.lease, JobState.SUCCEEDED))

    def count_outbox(self) -> int:
        """Return the number of entries that MLflow has not received yet."""
        with self.database.reading() as session:
            return records.count(session, Outbox)


def _settings(url: str) -> TrackingSettings:
    return TrackingSettings(url, 60.0, "http://127.0.0.1:1")


def add_all_to_outbox(session: Session, run_id: str) -> None:
    """Put everything about a run into the outbox again, whatever MLflow has received before."""
    add_to_outbox(session, run_id, "started", {})
    for number in range(2):
        add_to_outbox(session, run_id, "fold", {"fold": number})
    add_to_outbox(session, run_id, "finished", {})
    add_to_outbox(session, run_id, "alias", {"alias": "champion"})


def add_folds(session: Session, run_id: str) -> None:
    """Add what two folds measured."""
    history = [{"loss": 1 / epoch, "val_loss": 2 / epoch} for epoch in range(1, 4)]
    for number in range(2):
        fold = Fold(number=number, epochs=3, best_epoch=3, stopped="epochs", metrics={"accuracy": 0.75})
        fold.run_id, fold.history = run_id, history
        runs.add_fold(session, fold)


@pytest.fixture
def case(sqlite: Database, store: Store) -> Case:
    return new_case(sqlite, store)


def new_case(database: Database, store: Store, prefix: str = "flowers-", **measured: Any) -> Case:
    """Add a finished run under a name of its own."""
    name = f"{prefix}{secrets.token_hex(4)}"
    with database.writing() as session:
        run = records.running_run(session, records.ready_version(session, name), name)
        add_folds(session, run.id)
        runs.succeed_run(session, run.id, METRICS | measured, 1.0)
        runs.add_artifact(session, run.id, "report.md", store.put(b"# Report"), 8, "text/markdown")
        registry.add_model_version(
            session, records.PRINCIPAL, name, run.id, records.digest("bundle"), records.digest("backbone")
        )
        add_all_to_outbox(session, run.id)
        return Case(database, store, run.id, name)


def shown_by_mlflow(url: str, name: str) -> dict[str, Any]:
    """Return all that MLflow shows of a model's runs, without what it numbers itself."""
    client = mlflow.MlflowClient(url, registry_uri=url)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return {
        "runs": sorted(
            (
                run.data.tags["espalier.fold"],
                run.info.status,
                "mlflow.parentRunId" in run.data.tags,
                {
                    metric: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]
                    for metric in sorted(run.data.metrics)
                },
                len(run.data.params),
                len(run.inputs.dataset_inputs),
                len(run.outputs.model_outputs) if run.outputs else 0,
                sorted(file.path for file in client.list_artifacts(run.info.run_id)),
                run.info.run_name.split("fold-")[0],
                sorted(tag for tag in run.data.tags if tag.startswith("espalier.")),
            )
            for run in found
        ),
        "models": len(client.search_logged_models([experiment.experiment_id])),
        "versions": [
            (int(version.version), version.tags["espalier.version"])
            for version in client.search_model_versions(f"name = '{name}'")
        ],
        "aliases": {alias: int(at) for alias, at in client.get_registered_model(name).aliases.items()},
    }


def test_a_failed_run_that_is_tried_again_is_shown_as_running_and_then_as_what_it_came_to(
    mlflow_url: str, sqlite: Database, store: Store
) -> None:
    name = f"again-{secrets.token_hex(4)}"
    with sqlite.writing() as session:
        run = records.queued_run(session, records.ready_version(session, name), name)
        case = Case(sqlite, store, run.id, name)
        job = run_jobs.queue_training(session, run)
        run_jobs.mark_started(session, job)
        job.state = JobState.FAILED
        run_jobs.mark_failed(session, job, Crashed("It died.").record())
    case.publish(mlflow_url)
    client = mlflow.MlflowClient(mlflow_url)

    def shown() -> tuple[str, str | None]:
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
        [found] = client.search_runs([experiment.experiment_id])
        return found.info.status, found.data.tags.get("mlflow.note.content")

    assert shown() == ("FAILED", "**Failed:** It died.")
    with sqlite.writing() as session:
        again = run_jobs.retry(session, runs.get_run(session, records.PRINCIPAL, run.id))
        run_jobs.mark_started(session, again)
        again.state = JobState.SUCCEEDED  # so that it is not what is published next
    case.publish(mlflow_url)
    assert shown() == ("RUNNING", None)
    with sqlite.writing() as session:
        assert run_jobs.request_cancel(session, run.id)
    case.publish(mlflow_url)
    assert shown() == ("KILLED", None)


def test_what_is_told_twice_is_shown_once(mlflow_url: str, case: Case) -> None:
    case.publish(mlflow_url)
    once = shown_by_mlflow(mlflow_url, case.name)
    assert [run[:3] for run in once["runs"]] == [
        ("fold-1", "FINISHED", True),
        ("fold-2", "FINISHED", True),
        ("summary", "FINISHED", False),
    ]
    assert once["models"] == 1 and once["versions"] == [(1, "1")] and once["aliases"] == {"champion": 1}
    assert [step for step, _ in once["runs"][0][3]["val/loss"]] == [1, 2, 3]
    with case.database.writing() as session:
        add_all_to_outbox(session, case.run_id)
    case.publish(mlflow_url)
    assert case.count_outbox() == 0
    assert shown_by_mlflow(mlflow_url, case.name) == once


@pytest.mark.parametrize("is_best", [True, False])
def test_a_table_that_is_told_twice_is_shown_once_in_place_of_an_earlier_one(
    mlflow_url: str, case: Case, is_best: bool
) -> None:
    less = {"difference": -0.125, "ci95": [-0.2, -0.05], "p_value": 0.0123}
    with case.database.writing() as session:
        run = session.get_one(Run, case.run_id)
        comparison = Comparison(project_id=run.project_id, dataset_version_id=run.dataset_version_id, name=run.name)
        session.add(comparison)
        session.flush()
        session.add(ComparisonRun(comparison_id=comparison.id, position=7, run_id=run.id))
        text = case.store.put(b"| a table |")

    def compare(verdict: str, difference: dict[str, Any] | None) -> None:
        table = {"verdict": verdict, "rows": [{"position": 0}, {"position": 7, "difference": difference}]}
        with case.database.writing() as session:
            comparisons.succeed_comparison(session, comparison.id, table, records.digest("picture"), text)
            add_to_outbox(session, case.run_id, "started", {})
            add_to_outbox(session, case.run_id, "comparison", {})
        case.publish(mlflow_url)

    client = mlflow.MlflowClient(mlflow_url, registry_uri=mlflow_url)
    compare("Before.", less if is_best else None)
    with case.database.writing() as session:
        session.get_one(Comparison, comparison.id).state = ComparisonState.RUNNING
    for _ in range(2):
        compare("The first.", None if is_best else less)
        with case.database.reading() as session:
            page = client.get_run(str(session.get_one(Run, case.run_id).mlflow_run_id))
        tags = {name: value for name, value in page.data.tags.items() if name.startswith("espalier.")}
        assert (tags["espalier.comparison"], tags["espalier.verdict"]) == (comparison.id, "The first.")
        assert tags.get("espalier.best_of") == (comparison.id if is_best else None)
        assert tags.get("espalier.difference_to_best") == (None if is_best else "-0.125")
        assert tags.get("espalier.p_value") == (None if is_best else "0.0123")
        files = [file.path for file in client.list_artifacts(page.info.run_id)]
        assert files.count("comparison.md") == 1
    assert len(shown_by_mlflow(mlflow_url, case.name)["runs"]) == 3 and case.count_outbox() == 0


def test_a_file_that_came_after_the_end_is_shown_beside_the_others(mlflow_url: str, case: Case) -> None:
    case.publish(mlflow_url)
    before = shown_by_mlflow(mlflow_url, case.name)
    with case.database.writing() as session:
        runs.add_artifact(session, case.run_id, "learning-curve.png", case.store.put(b"a picture"), 9, "image/png")
        add_to_outbox(session, case.run_id, "file", {"name": "learning-curve.png"})
        add_to_outbox(session, case.run_id, "file", {"name": "learning-curve.png"})
    case.publish(mlflow_url)
    after = shown_by_mlflow(mlflow_url, case.name)
    assert case.count_outbox() == 0 and set(after["runs"][2][7]) - set(before["runs"][2][7]) == {"learning-curve.png"}
    assert after["runs"][:2] == before["runs"][:2] and after["runs"][2][:7] == before["runs"][2][:7]


def test_what_was_left_open_is_shown_as_what_was_chosen(mlflow_url: str, sqlite: Database, store: Store) -> None:
    chosen = {"backbone": "vgg16", "features_from": "block3"}
    case = new_case(sqlite, store, features={"chosen": chosen, "score": "accuracy"})
    case.publish(mlflow_url)
    client = mlflow.MlflowClient(mlflow_url)
    with case.database.reading() as session:
        shown = client.get_run(str(session.get_one(Run, case.run_id).mlflow_run_id))
    assert shown.info.run_name.startswith("vgg16-block3-extraction-")
    assert {name: shown.data.tags[f"espalier.{name}"] for name in chosen} == chosen


def test_names_that_mlflow_does_not_take_are_shown_under_others(
    mlflow_url: str, sqlite: Database, store: Store
) -> None:
    case = new_case(sqlite, store, prefix="flowers.v2-")
    aliases = {"champion": "champion", "staging.eu": "staging-DOT-eu", "latest": "ALIAS-latest", "v1": "ALIAS-v1"}
    with sqlite.writing() as session:
        model = registry.get_model(session, records.PRINCIPAL, case.name)
        for alias in aliases:
            registry.move_alias(session, model, alias, registry.get_model_version(session, model, 1))
            add_to_outbox(session, case.run_id, "alias", {"alias": alias})
    case.publish(mlflow_url)
    shown = shown_by_mlflow(mlflow_url, case.name)
    assert case.count_outbox() == 0
    assert [run[1] for run in shown["runs"]] == ["FINISHED"] * 3
    assert shown["models"] == 1 and shown["aliases"] == dict.fromkeys(aliases.values(), 1)


def test_the_card_of_a_data_set_shows_the_names_of_classes_as_text(mlflow_url: str, case: Case) -> None:
    with case.database.writing() as session:
        version = session.get_one(DatasetVersion, session.get_one(Run, case.run_id).dataset_version_id)
        version.classes = [{**version.classes[0], "name": "<img src=x onerror=alert(1)>|"}]
    case.publish(mlflow_url)
    experiment = mlflow.MlflowClient(mlflow_url).get_experiment_by_name(case.name)
    assert experiment is not None
    assert r"| &lt;img src=x onerror=alert(1)&gt;\| | 10 |" in experiment.tags["mlflow.note.content"]


@pytest.mark.parametrize(
    ("path", "what", "status"),
    [
        ("/registered-models/create", "the model version", "FINISHED"),
        ("/runs/log-inputs", "the data set", "FINISHED"),
        ("/experiments/create", "alias", None),
    ],
)
def test_what_mlflow_refuses_for_good_is_recorded_and_nothing_waits_behind_it(
    relay: LossyRelay, case: Case, path: str, what: str, status: str | None
) -> None:
    relay.refused_path = path
    case.publish(relay.url)
    with case.database.reading() as session:
        assert get_unsent_rows(session, case.run_id) == []
        refusals = {row.payload["what"]: row.payload["reason"] for row in get_refusals(session, case.run_id)}
        page = session.get_one(Run, case.run_id).mlflow_run_id
    assert "Not like this." in refusals[what]
    if status is not None:
        assert refusals.keys() == {what}
        assert mlflow.MlflowClient(relay.url).get_run(str(page)).info.status == status
    with case.database.writing() as session:
        assert add_publish_jobs(session) == 0
        add_to_outbox(session, case.run_id, "started", {})
        add_to_outbox(session, case.run_id, "finished", {})
    relay.refused_path = None
    case.publish(relay.url)
    with case.database.reading() as session:
        assert get_refusals(session, case.run_id) == []  # it was told again, and taken


def test_an_experiment_that_another_worker_creates_at_the_same_time_is_used(relay: LossyRelay, case: Case) -> None:
    experiment_id = mlflow.MlflowClient(relay.url).create_experiment(case.name)
    relay.hidden_path = "/experiments/get-by-name"
    case.publish(relay.url)
    with case.database.reading() as session:
        assert (get_unsent_rows(session, case.run_id), get_refusals(session, case.run_id)) == ([], [])
        assert session.get_one(Run, case.run_id).mlflow_experiment_id == experiment_id
    assert relay.hidden_path is None


@pytest.mark.slow
def test_whichever_answer_is_lost_nothing_is_shown_twice(
    mlflow_url: str, relay: LossyRelay, sqlite: Database, store: Store
) -> None:
    chosen = {"chosen": {"backbone": "vgg16", "features_from": "block3"}}
    case = new_case(sqlite, store, features=chosen)
    case.publish(relay.url)
    undisturbed = shown_by_mlflow(mlflow_url, case.name)
    changes = relay.changes
    assert changes > 20
    for lost in range(1, changes + 1):
        again = new_case(sqlite, store, features=chosen)
        relay.changes, relay.loses_from = 0, lost
        with pytest.raises(Unavailable):
            again.publish(relay.url)
        relay.loses_from = None
        again.publish(relay.url)
        assert again.count_outbox() == 0
        assert shown_by_mlflow(mlflow_url, again.name) == undisturbed, f"the answer to change {lost} was lost"


@pytest.mark.usefixtures("long_back_off")
def test_a_run_is_told_once_mlflow_is_back(
    mlflow_url: str, relay: LossyRelay, case: Case, start_loop: StartLoop
) -> None:
    relay.loses_from = 1
    with case.database.writing() as session:
        assert add_publish_jobs(session) == 1
    with case.database.reading() as session:
        job_id = session.scalars(select(Job.id).where(Job.kind == JobKind.PUBLISH)).one()
    start_loop(case.database, Publish(case.store, _settings(relay.url)), kind=JobKind.PUBLISH, queue=Queue.TRACKING)
    until(lambda: look(case.database, job_id).attempt == 1 and look(case.database, job_id).state is JobState.QUEUED)
    assert case.count_outbox() == 5
    relay.loses_from = None
    make_due(case.database, job_id)
    settled(case.database, job_id, JobState.SUCCEEDED)
    assert case.count_outbox() == 0
    assert len(shown_by_mlflow(mlflow_url, case.name)["runs"]) == 3
    with case.database.reading() as session:
        assert session.get_one(Run, case.run_id).mlflow_run_id


def test_the_end_of_a_run_that_is_tried_again_is_told_at_its_next_end(
    mlflow_url: str, sqlite: Database, store: Store
) -> None:
    name = f"flowers-{secrets.token_hex(4)}"

    def fail(session: Session, run_id: str) -> None:
        runs.fail_run(session, run_id, {"code": "crashed", "detail": "It died."})
        add_to_outbox(session, run_id, "finished", {})

    def shown() -> str:
        case = Case(sqlite, store, run_id, name)
        case.publish(mlflow_url)
        assert case.count_outbox() == 0
        with sqlite.reading() as session:
            page = str(session.get_one(Run, run_id).mlflow_run_id)
        return str(mlflow.MlflowClient(mlflow_url).get_run(page).info.status)

    with sqlite.writing() as session:
        run_id = records.running_run(session, records.ready_version(session), name).id
        add_to_outbox(session, run_id, "started", {})
        fail(session, run_id)
        runs.reopen_run(session, run_id)
    assert shown() == "RUNNING"
    with sqlite.writing() as session:
        runs.start_run(session, run_id)
        fail(session, run_id)
    assert shown() == "FAILED"


@pytest.mark.usefixtures("long_back_off")
def test_a_run_whose_report_is_gone_is_told_of_again_by_the_same_job(
    mlflow_url: str, case: Case, start_loop: StartLoop
) -> None:
    case.store.delete(digest_of(b"# Report"))
    start_loop(case.database, Publish(case.store, _settings(mlflow_url)), kind=JobKind.PUBLISH, queue=Queue.TRACKING)
    until(lambda: case.count_outbox() == 2)
    time.sleep(1)
    with case.database.reading() as session:
        job_id = session.scalars(select(Job.id)).one()
    assert settled(case.database, job_id, JobState.QUEUED).next_attempt_at is not None
    case.store.put(b"# Report")
    make_due(case.database, job_id)
    settled(case.database, job_id, JobState.SUCCEEDED)
    assert case.count_outbox() == 0


def test_an_address_where_nothing_listens_is_unavailable_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    connect = socket.socket.connect

    def counted(self: socket.socket, address: Any) -> None:
        tried.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", counted)
    with socket.socket() as held:  # nobody can take its port, and nobody listens there
        held.bind(("127.0.0.1", 0))
        host, port = held.getsockname()
        with pytest.raises(Unavailable, match="did not accept a request"):
            case.publish(f"http://{host}:{port}")
    assert tried == [(host, port)], "once, and never again"
    assert case.count_outbox() == 5
