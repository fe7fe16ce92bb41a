"""Fixtures for all tests: real databases, a real broker and stores.

Environment variables of the user that would change the tests are removed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import postgres
import pytest
import redis
from buckets import KEYS, Bucket, NetworkProxy, make_bucket, serving
from hypothesis import HealthCheck, settings
from sqlalchemy import Connection, create_engine, text
from waiting import until_no

from artifacts.store import Store
from models.session import Database
from no_telemetry import turn_off_telemetry
from ops.migrate import upgrade
from ops.valkey_binary import get_binary_path

# Tests must not use the database or the keys of the user; processes that tests start inherit this environment.
for _name in list(os.environ):
    if _name.startswith(("ESPALIER_", "AWS_")) or _name in ("DATABASE_URL", "REDIS_URL", "MLFLOW_TRACKING_URI"):
        del os.environ[_name]
# The time of an example depends mostly on how busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
turn_off_telemetry()  # some tests import ONNX Runtime themselves


@pytest.fixture(autouse=True)
def _mlflow_as_it_was() -> Iterator[None]:
    """Restore the environment variables of MLflow after each test, because publishing sets some."""
    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    yield
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store in a folder, or in a bucket if the test is parametrized so (`buckets.EACH_STORE`)."""
    if getattr(request, "param", "folder") == "folder":
        return Store(tmp_path / "store")
    bucket: Bucket = request.getfixturevalue("bucket")
    return bucket.store()


@pytest.fixture
def fill_disk() -> Callable[[Path], None]:
    """Returns a function: after its call, every write to the open files of a folder fails because the disk is full."""

    def fill(folder: Path) -> None:
        files = [file.stat() for file in folder.iterdir()]
        full = os.open("/dev/full", os.O_WRONLY)
        found = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                status = os.fstat(int(name))
            except OSError:  # the descriptor with which /proc/self/fd was listed
                continue
            if any(os.path.samestat(status, file) for file in files):
                os.dup2(full, int(name))
                found += 1
        os.close(full)
        assert found == len(files), "a file of the folder is not open"

    return fill


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a real S3 server of this test session."""
    with serving() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new bucket, with the keys to it in the environment."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    return make_bucket(s3_server, tmp_path / "cache")


@pytest.fixture
def line(s3_server: str) -> Iterator[NetworkProxy]:
    """A network proxy to the S3 server that can fail."""
    line = NetworkProxy(s3_server)
    yield line
    line.close()


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """Address of a real PostgreSQL server of this test session."""
    with tempfile.TemporaryDirectory(prefix="espalier-pg-") as folder:
        server = postgres.serving(Path(folder))
        url = server.get_uri(driver="psycopg")
        with _administering(url) as admin:  # without these safeguards, the server stops in seconds instead of minutes
            for safeguard in ("fsync", "synchronous_commit", "full_page_writes"):
                admin.execute(text(f"ALTER SYSTEM SET {safeguard} = off"))
            admin.execute(text("SELECT pg_reload_conf()"))
        yield url
        server.cleanup()


@pytest.fixture(scope="session")
def migrated_template(postgresql_url: str) -> str:
    """Name of a migrated PostgreSQL database to copy, which is quicker than to migrate each."""
    with _administering(postgresql_url) as admin:
        admin.execute(text("CREATE DATABASE migrated"))
        database = Database(admin.engine.url.set(database="migrated"))
        upgrade(database)
        database.close()
    return "migrated"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database of each kind without a schema."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'test.db'}")
        yield database
        database.close()
        return
    name = f"test_{secrets.token_hex(6)}"
    # `database` fills it; PostgreSQL can only be asked for a copy when a database is made.
    is_copy = "database" in request.fixturenames
    # Files are copied in half the time that writing them anew takes, as long as no disk is waited for.
    like = f" TEMPLATE {request.getfixturevalue('migrated_template')} STRATEGY FILE_COPY" if is_copy else ""
    with _administering(request.getfixturevalue("postgresql_url")) as admin:
        admin.execute(text(f"CREATE DATABASE {name}{like}"))
        database = Database(admin.engine.url.set(database=name))
        yield database
        database.close()
        admin.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


@contextmanager
def _administering(url: str) -> Iterator[Connection]:
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        yield connection
    admin.dispose()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy, which is quicker than to migrate each."""
    file = tmp_path_factory.mktemp("schema") / "migrated.db"
    database = Database(f"sqlite:///{file}")
    upgrade(database)
    database.close()
    return file


@pytest.fixture
def database(empty_database: Database, migrated_file: Path) -> Database:
    """A migrated database of each kind: the test runs once on SQLite and once on PostgreSQL."""
    if empty_database.is_sqlite:
        shutil.copy(migrated_file, str(empty_database.engine.url.database))
    return empty_database


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """Address of a real Valkey server of this test session."""
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        socket = f"{folder}/valkey.sock"
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", socket, "--save", ""]
        server = subprocess.Popen([*command, "--dir", folder], stdout=subprocess.DEVNULL)
        client = redis.Redis(unix_socket_path=socket)
        until_no(redis.RedisError, client.ping)
        client.close()
        yield f"redis+socket://{socket}"
        server.terminate()
        server.wait()
