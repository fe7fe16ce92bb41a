"""Submits the runs of a soak, a few at a time, and cancels and retries some of them. Knows no faults."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from errors import EspalierError

_OUTSTANDING = 4
FINAL_STATES = ("succeeded", "failed", "cancelled")
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
"""A recipe that always fails, so that failures are accounted for, too."""


@dataclass
class SubmittedRun:
    """A submitted run; `recipe` is its index in `RECIPES`, or None for the one that diverges."""

    id: str
    recipe: int | None


class RunStream:
    """Submits a few runs at a time, each until it is confirmed; cancels and retries some."""

    def __init__(self, api: Callable[[], httpx2.Client], dataset: str, chance: random.Random) -> None:
        self._api = api
        self._dataset = dataset
        self._chance = chance
        self.submitted: list[SubmittedRun] = []
        self.cancels = self.retries = self.replays = 0

    def step(self) -> None:
        """Submit a run if few are unfinished; sometimes cancel or retry one."""
        states = self.states()
        if sum(state not in FINAL_STATES for state in states.values()) < _OUTSTANDING:
            self.submit()
        under_way = [run for run, state in states.items() if state not in FINAL_STATES]
        if under_way and self._chance.random() < 0.005:
            run = self._chance.choice(under_way)
            self.cancels += self._post(f"/api/v1/runs/{run}/cancel").status_code == 202
        failed = [run for run, state in states.items() if state == "failed"]
        if failed and self._chance.random() < 0.02:
            self.retries += self._post(f"/api/v1/runs/{self._chance.choice(failed)}/retry").status_code == 202

    def submit(self, place: int | None = None) -> None:
        """Submit one run, repeating the request with its key until it is confirmed; sometimes repeat it once more.

        `place` is the index of its recipe; None chooses one at random, sometimes the one that diverges.
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
            raise EspalierError(f"Expected status 202 for a run. Received {answer.status_code}: {answer.text}")
        self.submitted.append(SubmittedRun(answer.json()["id"], number))
        if self._chance.random() < 0.1:
            again = self._post("/api/v1/runs", order, key)
            if again.json()["id"] != answer.json()["id"]:
                raise EspalierError("Expected the first run for a repeated key. Received a second run.")
            self.replays += 1

    def states(self) -> dict[str, str]:
        """Return the state of every submitted run by its id."""
        found: dict[str, str] = {}
        cursor = None
        with self._api() as api:
            while True:
                query = {"limit": 200} | ({"cursor": cursor} if cursor else {})
                page = self._send_until_answered(lambda query=query: api.get("/api/v1/runs", params=query)).json()  # type: ignore[misc]
                found |= {run["id"]: run["state"] for run in page["items"]}
                cursor = page["next_cursor"]
                if cursor is None:
                    return {run.id: found[run.id] for run in self.submitted}

    def _post(self, url: str, order: Any = None, headers: Any = None) -> httpx2.Response:
        with self._api() as api:
            return self._send_until_answered(lambda: api.post(url, json=order, headers=headers))

    def _send_until_answered(self, ask: Callable[[], httpx2.Response]) -> httpx2.Response:
        """Send a request until the service answers with something else than a temporary failure."""
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
