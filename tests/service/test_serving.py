"""Predictions of a running service while its processes end and its aliases move."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sample
from running import Service
from waiting import until

from benchmarks.load import Load, load, post


def answering_version(service: Service) -> int:
    answer = service.http.post("/api/v1/models/asked-for/predict", content=sample.png(1))
    return int(answer.json()["version"])


@pytest.mark.slow
def test_neither_a_moved_alias_nor_an_api_that_is_told_to_end_costs_a_request(
    service: Service, colours: dict[str, Any]
) -> None:
    is_over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        for cut in ("block1", "block2"):  # on two networks
            assert service.train(colours["id"], "asked-for", features_from=cut)["state"] == "succeeded"
        request = post("/api/v1/models/asked-for/predict", sample.png(1))
        assert load(service.port, [request], 1, 1.0).statuses[200]

        flood = pool.submit(
            load,
            service.port,
            [request],
            8,
            300.0,
            keeps_bodies=True,
            is_over=lambda found: found.refused > 8 or is_over.is_set(),
        )
        try:
            for version in (2, 1, 2):
                time.sleep(1.0)
                service.http.put("/api/v1/models/asked-for/aliases/champion", json={"version": version})
                until(lambda version=version: answering_version(service) == version)
                assert answering_version(service) == version, "there is no way back"
        except BaseException:
            is_over.set()
            raise
        service.find("api.app").terminate()
        found: Load = flood.result()
        assert found.statuses.keys() == {200} and found.broken == 0, found.figures()
        assert found.refused > 0, "it did end"
        assert {json.loads(body)["version"] for body in found.bodies} == {1, 2}
    until(service.is_ready)  # for whoever comes next
