"""Models for tests of predictions. They use `FlatEngine`, which needs no network file."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import records
import sample
from fastapi.testclient import TestClient

from api.dependencies import Services
from api.prediction_queue import PredictionQueue
from api.version_resolver import VersionResolver
from artifacts.bundle import Bundle, Dense
from artifacts.decode_memory import DecodeMemory
from artifacts.images import IMAGE_RULE
from artifacts.store import Digest
from inference import heads
from inference.engine import Engine, FlatEngine
from inference.shelf import Shelf
from models import registry
from recipes.layers import Activation
from recipes.recipe import Precision, Resize, Task
from settings import Settings

SIZE = 8
PNG = sample.png(1)


class CountingLoader:
    """Loads flat engines and lists what it has loaded. Loading a digest in `held` blocks until `gate` is set."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.gate = threading.Event()
        self.seen: list[str] = []

    def __call__(self, path: Path, precision: Precision, threads: int) -> Engine:
        self.seen.append(path.name)
        if path.name in self.held:
            assert self.gate.wait(120)
        return FlatEngine()


def flat_bundle(
    backbone: Digest,
    task: Task = Task.MULTICLASS,
    labels: tuple[str, ...] = ("dark", "light"),
    outputs: int = 2,
    seed: int | None = None,
) -> Bundle:
    """Return a bundle for the flat engine. Its head has random weights, or without a seed adds up all features."""
    random = np.random.default_rng(seed)
    kernel = np.ones((48, outputs)) if seed is None else random.normal(size=(48, outputs))
    layers = (Dense(kernel.astype(np.float32), np.zeros(outputs, np.float32), Activation.LINEAR),)
    golden = random.integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    return Bundle(
        task=task,
        labels=labels,
        backbone=backbone,
        engine="flat",
        precision=Precision.FLOAT32,
        image_rule=IMAGE_RULE,
        size=SIZE,
        resize=Resize.SQUASH,
        layers=layers,
        golden_input=golden,
        golden_output=heads.logits(layers, FlatEngine().features(golden)),
    )


def add_model(services: Services, name: str, bundle: Bundle, *, can_be_champion: bool = True) -> None:
    """Add a bundle as the next version of a model."""
    digest = services.store.put(bundle.dump())
    with services.database.writing() as session:
        run = records.queued_run(session, records.ready_version(session, f"{name}-{digest[:8]}"), name)
        registry.add_model_version(
            session, records.PRINCIPAL, name, run.id, digest, bundle.backbone, can_be_champion=can_be_champion
        )


def serve(client: TestClient, settings: Settings, loads: CountingLoader) -> None:
    """Make the application load its engines with `loads`."""
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    shelf = Shelf(services.store, 1, 10**9, loads)
    services.metrics.watch(shelf.loaded)
    client.app.state.services = replace(  # type: ignore[attr-defined]
        services,
        settings=settings,
        shelf=shelf,
        version_resolver=VersionResolver(services.database, shelf),
        prediction_queue=PredictionQueue(settings, shelf, DecodeMemory(settings.decode_bytes)),
    )
