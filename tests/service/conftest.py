"""The whole service as a user starts it: `ops.up` with SQLite, Valkey, API, worker and MLflow, on free ports."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample
from running import Service, started
from watching import watch


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which all Python processes of the service report what they connect to and start."""
    return tmp_path_factory.mktemp("watched") / "acts"


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, watched: Path) -> Iterator[Service]:
    var = tmp_path_factory.mktemp("service") / "var"
    var.mkdir(mode=0o755)
    with started(var, **watch(watched), PGPASSWORD="of-a-neighbour") as service:
        yield service
        service.end(signal.SIGINT)


@pytest.fixture(scope="session")
def colours(service: Service) -> dict[str, Any]:
    """A ready data set of 3 x 20 images."""
    return service.upload("colours", sample.zipped(sample.coloured(per_class=20)))


@pytest.fixture(scope="session")
def trained(service: Service, colours: dict[str, Any]) -> dict[str, Any]:
    """A finished run on it, the first of the model `colours`."""
    run = service.train(colours["id"], "colours")
    assert run["state"] == "succeeded", run
    return run


@pytest.fixture(scope="session")
def unreachable(service: Service, colours: dict[str, Any]) -> dict[str, Any]:
    """A run that failed: its weights could not be fetched."""
    return service.train(colours["id"], "unreachable", weights="imagenet")
