"""Predictions of a running service while its processes end and its aliases move."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sample
from running import Service, started

from benchmarks.load import Load, load, post


def answering_version(service: Service) -> int:
    answer = service.http.post("/api/v1/models/colours/predict", content=sample.png(1))
    return int(answer.json()["version"])


@pytest.mark.slow
def test_neither_a_moved_alias_nor_an_api_that_is_told_to_end_costs_a_request(tmp_path: Path) -> None:
    with started(tmp_path / "var") as service, ThreadPoolExecutor(1) as pool:
        dataset = service.upload("colours", sample.zipped(sample.coloured(per_class=8)))["id"]
        for cut in ("block1", "block2"):  # on two networks
            assert service.train(dataset, "colours", features_from=cut)["state"] == "succeeded"
        request = post("/api/v1/models/colours/predict", sample.png(1))
        assert load(service.port, [request], 1, 1.0).statuses[200]

        flood = pool.submit(load, service.port, [request], 8, 12.0, keeps_bodies=True)
        took = []
        for version in (2, 1, 2):
            time.sleep(1.0)
            service.http.put("/api/v1/models/colours/aliases/champion", json={"version": version})
            began = time.monotonic()
            while (
                service.http.post("/api/v1/models/colours/predict", content=sample.png(1)).json()["version"] != version
            ):
                assert time.monotonic() < began + 20
            took.append(time.monotonic() - began)
        assert max(took[1:]) < 1.0, "both networks are loaded by then"
        service.find("api.app").terminate()
        found: Load = flood.result()
        assert found.statuses.keys() == {200} and found.broken == 0, found.figures()
        assert found.refused > 0, "it did end"
        assert {json.loads(body)["version"] for body in found.bodies} == {1, 2}
