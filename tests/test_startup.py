"""What cannot be is told before anything starts, by every command, in one sentence and without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, free_port

from ops.up import make_private
from startup import CannotStart, load_settings, open_database, prepare_folder

COMMANDS = {
    "make up": "ops.up",
    "API": "api.app",
    "worker": "celery --app worker.app worker --queues cpu",
    "make collect": "ops.collect",
    "make weights": "ops.weights vgg16 mine weights.h5",
    "migrations": "ops.migrate",
}
NOWHERE = "postgresql://me:s3cret@127.0.0.1:9/x"
QUEUES = {"ESPALIER_QUEUES": "nope"}
KEY = {"ESPALIER_API_KEY": "schlüssel-schlüssel"}
FOLDER = {"ESPALIER_VAR": "/proc/nowhere"}
FILE = {"ESPALIER_VAR": __file__}
AWAY = {"DATABASE_URL": NOWHERE}
DATABASE_FILE = {"DATABASE_URL": "sqlite:////proc/nowhere.db"}


@pytest.mark.parametrize(
    ("command", "settings", "says"),
    [
        ("make up", QUEUES, "ESPALIER_QUEUES: Input should be 'ingest', 'cpu', 'gpu' or 'tracking'"),
        (
            "make up",
            FOLDER,
            "The data folder /proc/nowhere cannot be used: No such file or directory. Set ESPALIER_VAR",
        ),
        ("make up", AWAY, "The database postgresql://me:***@127.0.0.1:9/x cannot be used: connection failed"),
        ("API", FILE, "test_startup.py cannot be used: File exists. Set ESPALIER_VAR"),
        ("API", DATABASE_FILE, "The database sqlite:////proc/nowhere.db cannot be used: unable to open database file"),
        ("worker", QUEUES, "ESPALIER_QUEUES: Input should be"),
        ("worker", FOLDER, "The data folder /proc/nowhere cannot be used"),
        ("make collect", AWAY, "The database postgresql://me:***@127.0.0.1:9/x cannot be used: connection failed"),
        ("make weights", KEY, "ESPALIER_API_KEY must contain only printable ASCII characters"),
        ("migrations", FOLDER, "cannot be used: No such file or directory. Set ESPALIER_VAR"),
        ("migrations", AWAY, "The database postgresql://me:***@127.0.0.1:9/x cannot be used: connection failed"),
    ],
)
def test_what_cannot_be_is_told_by_every_command_before_anything_starts(
    tmp_path: Path, command: str, settings: dict[str, str], says: str
) -> None:
    ports = {name: str(free_port()) for name in ("ESPALIER_API_PORT", "ESPALIER_MLFLOW_PORT")}
    done = subprocess.run(
        [sys.executable, "-m", *COMMANDS[command].split()],
        cwd=ROOT,
        env=os.environ | {"ESPALIER_VAR": str(tmp_path)} | ports | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    told = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1 and says in told and "Traceback" not in told and "s3cret" not in told, told
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ESPALIER_API_PORT", "99999", "ESPALIER_API_PORT: Input should be less than or equal to 65535"),
        ("ESPALIER_API_HOST", "0.0.0.0", "ESPALIER_API_HOST=0.0.0.0 would give everyone on the network access."),
        ("ESPALIER_API_KEY", "short", "ESPALIER_API_KEY has 5 characters, which are too easy to guess."),
        ("ESPALIER_STORE_URL", "bucket", "ESPALIER_STORE_URL: Expected a bucket as s3://name"),
        ("ESPALIER_TRUSTED_PROXIES", "127.0.0.1,proxy", "ESPALIER_TRUSTED_PROXIES: Expected IP addresses and networks"),
        ("ESPALIER_TRUSTED_PROXIES", "172.16.0.1/12", "Received '172.16.0.1/12'."),
        ("DATABASE_URL", "mysql://me:s3cret@db/x", "Received 'mysql://me:***@db/x'."),
        ("DATABASE_URL", "espalier.db", "DATABASE_URL: Expected an address such as postgresql://"),
        ("REDIS_URL", "127.0.0.1:6379", "REDIS_URL: Expected an address such as redis://host:6379/0"),
        ("REDIS_URL", "unix:///run/valkey.sock", "redis+socket:///folder/valkey.sock"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_what_it_expects(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(CannotStart) as told:
        load_settings()
    assert says in str(told.value) and len(str(told.value).splitlines()) == 1
    assert "s3cret" not in str(told.value) and "Value error" not in str(told.value)


def test_a_file_that_is_no_database_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_VAR", str(tmp_path))
    (tmp_path / "espalier.db").write_bytes(b"something else, but much longer than a header" * 99)
    with pytest.raises(CannotStart, match="file is not a database"):
        open_database(load_settings())


@pytest.mark.parametrize("odd", ["50% off", "100%25", "what?", "a ; b # c", 'it\'s "odd"', "ünï@ 꼭:1"])
def test_the_data_folder_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str) -> None:
    monkeypatch.setenv("ESPALIER_VAR", str(tmp_path / odd))
    settings = load_settings()
    prepare_folder(settings.var)
    open_database(settings).close()
    assert [file.name for file in tmp_path.iterdir()] == [odd]
    assert (tmp_path / odd / "espalier.db").is_file() and (tmp_path / odd).stat().st_mode & 0o777 == 0o700


def test_a_folder_with_files_of_others_is_not_made_private(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    tmp_path.chmod(0o755)
    with pytest.raises(CannotStart, match="it has files of other programs"):
        make_private(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    (tmp_path / "espalier.db").touch()
    make_private(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o700
