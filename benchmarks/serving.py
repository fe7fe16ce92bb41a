"""Measures prediction requests per second (JPEG in, probabilities out) of Espalier, LitServe, BentoML and the engine.

Every server has the same network with random weights, the same files and the same clients. Only one server runs at a
time, and the servers take turns in every round. Espalier also predicts in the other precisions that the processor has.
Three measurements are of Espalier alone: a thousand models on one backbone with the memory that they take, an alias
that moves under load, and (with `--overload 600`) twice as many requests as it can answer, for 600 seconds.

LitServe and BentoML need another Python environment, which `make bench-serving` makes.

Run as `python -m benchmarks.serving
[--backbone xception] [--size 299] [--rounds 3] [--seconds 15] [--clients 1 8 32] [--heads 1000]
[--peers .cache/peers/bin/python] [--peer-models 40] [--data archive.zip] [--overload 600]`.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from artifacts import images
from artifacts.bundle import Bundle, Dense
from artifacts.images import IMAGE_RULE
from artifacts.store import Digest
from benchmarks.bench_data import LIMITS, BenchData, add_dataset, free_port, prepare_bench_data
from benchmarks.figures import processor, report, spread, table
from benchmarks.load import Load, form, load, post
from inference import heads
from inference.batcher import LARGEST_BATCH
from inference.engine import OpenVinoEngine
from models import registry
from models import run as runs
from models.project import Principal
from models.session import Database
from ops.migrate import upgrade
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.defaults import ClassCount, fill
from recipes.layers import Activation
from recipes.recipe import Precision, Recipe, Resize, Task
from training.networks.quantisation import quantise

_OURS = "Espalier"
# The ratio to the best of the other servers that each should reach, with 8 clients.
_AIMS = {_OURS: "1.2 at 8", f"{_OURS} bfloat16": "2 at 8", f"{_OURS} int8": "3 at 8"}
_FILES = 64
_PEERS = Path(__file__).parent / "peers"
_START_WITHIN_S = 1200.0


@dataclass(frozen=True)
class Server:
    """A server to measure.

    Attributes:
        name: its name in the report.
        ready: path of a URL that answers 200 once the server is ready.
        command: the command that starts it.
        folder: the working directory of the command.
        environment: additional environment variables.
        requests: the HTTP requests to send, which are sent in turn.
    """

    name: str
    ready: str
    command: Sequence[str]
    folder: Path
    environment: dict[str, str]
    requests: Sequence[bytes]


@contextmanager
def running(server: Server, port: int) -> Iterator[psutil.Process]:
    """Start a server, wait for its first answer, and terminate it with its child processes at the end."""
    with subprocess.Popen(
        server.command,
        cwd=server.folder,
        env=os.environ | server.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            deadline = time.monotonic() + _START_WITHIN_S
            while not _is_ready(port, server.ready):  # LitServe fails if requests come before it is ready
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{server.name} ended, or was not ready within {_START_WITHIN_S:.0f} s.")
                time.sleep(0.5)
            # A server answers 503 while it is still reading its network.
            while (found := load(port, server.requests[:1], 1, 0.2)).statuses.keys() != {200}:
                if found.statuses.keys() - {200, 503} or found.broken or time.monotonic() > deadline:
                    raise RuntimeError(f"{server.name} answered with other statuses than 200: {found.figures()}.")
                time.sleep(0.5)
            yield psutil.Process(process.pid)
        finally:
            with suppress(psutil.NoSuchProcess):  # it did not start
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.terminate()
            process.terminate()
            process.wait(30)


def _is_ready(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


# --- the models -------------------------------------------------------------------------------------------------------


def add_models(bench: BenchData, count: int, size: int, hidden: int | None) -> None:
    """Add `count` models on the backbone, each with its own head, and one model in each other precision.

    The first model has two versions, so that its alias can move.
    """
    networks = dict.fromkeys(OpenVinoEngine.precisions(), bench.backbone)
    exported = bench.store.read(bench.backbone)
    networks[Precision.INT8] = bench.store.put(quantise(exported, bench.pixels, lambda done, total: None).onnx)
    database = Database(f"sqlite:///{bench.folder / 'espalier.db'}")
    upgrade(database)
    recipe = fill(Recipe(), Task.MULTICLASS, [ClassCount(label, 100, 100) for label in bench.labels])
    with database.writing() as session:
        version = add_dataset(session, bench)
        for precision, network in networks.items():
            engine = OpenVinoEngine(bench.store.path(network), precision, bench.threads)
            features = engine.features(bench.pixels[:1])
            names = [name(number) for number in [0, *range(count)]]
            for model in names if precision is Precision.FLOAT32 else [precision.value]:
                bundle = replace(_bundle(bench, features, size, hidden), precision=precision, backbone=network)
                digest = bench.store.put(bundle.dump())
                run = runs.create_run(session, Principal(), version.id, model, recipe)
                registry.add_model_version(session, Principal(), model, run.id, digest, network)
    database.close()


def name(number: int) -> str:
    """Return the name of the model with this number."""
    return f"model-{number}"


def _bundle(bench: BenchData, features: Any, size: int, hidden: int | None) -> Bundle:
    random = np.random.default_rng()
    units = [features.shape[1], *([hidden] if hidden else []), len(bench.labels)]
    layers = tuple(
        Dense(
            (random.normal(size=(inputs, outputs)) / np.sqrt(inputs)).astype(np.float32),
            np.zeros(outputs, np.float32),
            Activation.LINEAR if outputs == units[-1] else Activation.RELU,
        )
        for inputs, outputs in itertools.pairwise(units)
    )
    return Bundle(
        task=Task.MULTICLASS,
        labels=tuple(bench.labels),
        backbone=Digest(bench.backbone),
        engine="openvino",
        precision=Precision.FLOAT32,
        image_rule=IMAGE_RULE,
        size=size,
        resize=Resize.SQUASH,
        layers=layers,
        golden_input=bench.pixels[:1],
        golden_output=heads.logits(layers, features),
    )


# --- measurements -----------------------------------------------------------------------------------------------------


def bare_rate(bench: BenchData, seconds: float) -> float:
    """Return the images per second of the engine alone, on decoded images and at its fastest batch size."""
    engine = OpenVinoEngine(bench.store.path(bench.backbone), Precision.FLOAT32, bench.threads)
    best = 0.0
    size = 1
    while size <= LARGEST_BATCH:
        pixels = np.resize(bench.pixels, (size, *bench.pixels.shape[1:]))
        engine.features(pixels)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds / 3 or not done:
            engine.features(pixels)
            done += size
        rate = done / (time.perf_counter() - began)
        if rate < 1.03 * best:
            break
        best, size = max(best, rate), 2 * size
    return best


def median_ms(function: Callable[[], object], rounds: int = 20) -> float:
    """Return the median duration of a call in milliseconds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def alone_ms(bench: BenchData, file: bytes, size: int) -> float:
    """Return the milliseconds of decoding and the engine for one image, without a server."""
    engine = OpenVinoEngine(bench.store.path(bench.backbone), Precision.FLOAT32, bench.threads)
    return median_ms(lambda: engine.features(images.decode(file, size, Resize.SQUASH, LIMITS)[None]))


def moved_alias(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Move an alias between two versions under load.

    Return the figures: the seconds until answers came from the new version, and the number of failed requests.
    """
    took: list[float] = []
    is_over = threading.Event()

    def move() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        version = 1
        while not is_over.wait(2.0):
            version = 3 - version
            body = json.dumps({"version": version})
            connection.request("PUT", f"/api/v1/models/{name(0)}/aliases/champion", body)
            answer = connection.getresponse()
            answer.read()
            began = time.perf_counter()
            while True:
                connection.request("POST", f"/api/v1/models/{name(0)}/predict", requests[0].split(b"\r\n\r\n", 1)[1])
                if json.loads(connection.getresponse().read()).get("version") == version:
                    break
            took.append(time.perf_counter() - began)

    mover = threading.Thread(target=move)
    mover.start()
    found = load(port, requests, clients, seconds)
    is_over.set()
    mover.join()
    failed = sum(count for status, count in found.statuses.items() if status != 200) + found.broken
    return {"moves": len(took), "seen_after_s": spread(took), "failed": failed, "answered": found.statuses[200]}


def resident_mb(process: psutil.Process) -> float:
    """Return the resident memory in MB of a process and its descendants."""
    found = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # it has just ended
            found += one.memory_info().rss
    return found / 2**20


def main() -> None:
    """Measure all servers and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=BackboneName, choices=list(BackboneName), default=BackboneName.XCEPTION)
    parser.add_argument("--size", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--heads", type=int, default=1000)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--peer-models", type=int, default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--overload", type=float, default=0.0)
    args = parser.parse_args()
    size = args.size or CATALOGUE[args.backbone].size
    with prepare_bench_data(args.backbone, CATALOGUE[args.backbone].last_cut, size, _FILES, args.data) as bench:
        files = [bench.store.read(row.sha256) for row in bench.rows]
        add_models(bench, args.heads, size, args.hidden)
        port = free_port()
        ours = Server(
            _OURS,
            "/readyz",
            [sys.executable, "-m", "api.app"],
            Path.cwd(),
            {"ESPALIER_VAR": str(bench.folder), "ESPALIER_API_PORT": str(port), "ESPALIER_PREDICT_DEADLINE_S": "30"},
            [post(f"/api/v1/models/{name(0)}/predict", file) for file in files],
        )
        coarser = [
            replace(ours, name=f"{_OURS} {other}", requests=[post(f"/api/v1/models/{other}/predict", f) for f in files])
            for other in OpenVinoEngine.precisions()
            if other is not Precision.FLOAT32
        ]
        servers = [ours, *coarser, *(peers(args, size, port, files) if args.peers else [])]
        found: dict[str, dict[int, list[Load]]] = {server.name: {} for server in servers}
        bare = []
        for number in range(args.rounds):
            bare.append(bare_rate(bench, args.seconds))
            for server in servers:
                with running(server, port):
                    for clients in args.clients:
                        load(port, server.requests, clients, 2.0)
                        one = load(port, server.requests, clients, args.seconds)
                        found[server.name].setdefault(clients, []).append(one)
                        print(
                            f"round {number + 1}: {server.name}, {clients} clients: {one.per_second:.2f}/s", flush=True
                        )
        figures: dict[str, Any] = {
            "backbone": args.backbone,
            "size": size,
            "bare_engine_per_s": spread(bare),
            "servers": {
                server: {str(clients): [one.figures() for one in many] for clients, many in of_server.items()}
                for server, of_server in found.items()
            },
            "alone_ms": alone_ms(bench, files[0], size),
        }
        figures |= on_ours(ours, port, args, files)
        if args.peers and args.peer_models:
            litserve = next(server for server in servers if server.name == "LitServe")
            figures["many_models_of_a_peer"] = of_a_peer(litserve, port, args.peer_models, files, args.seconds)
    report(f"serving-{args.backbone.value}", figures)
    show(figures, found, bare, args.clients)


def on_ours(ours: Server, port: int, args: argparse.Namespace, files: Sequence[bytes]) -> dict[str, Any]:
    """Measure the features that only Espalier has: many models on one backbone, aliases and bounded queues."""
    clients, seconds = 8, args.seconds
    spread_out = [
        post(f"/api/v1/models/{name(number)}/predict", files[number % len(files)]) for number in range(args.heads)
    ]
    figures: dict[str, Any] = {}
    with running(ours, port) as process:
        load(port, ours.requests, clients, seconds)
        before = resident_mb(process)
        ratios = []
        for number in range(args.rounds):
            one = load(port, ours.requests, clients, seconds)
            if not number:  # every head once
                load(port, spread_out, 32, 3600.0, most=args.heads)
                after = resident_mb(process)
            many = load(port, spread_out, clients, seconds)
            ratios.append(many.per_second / one.per_second)
        figures["many_models"] = {
            "models": args.heads,
            "hidden": args.hidden,
            "rate_against_one": spread(ratios),
            "more_memory_mb": round(after - before, 1),
        }
        figures["alias"] = moved_alias(port, ours.requests, clients, seconds)
    if args.overload:
        eager = replace(ours, environment=ours.environment | _FIVE_SECONDS)
        with running(eager, port) as process:
            capacity = load(port, ours.requests, 8, seconds).per_second
            clients = max(16, int(4 * capacity * 5))  # so many that some clients are always free
            with ThreadPoolExecutor(1) as watching:
                memory = watching.submit(watch, process, args.overload)
                flood = load(port, ours.requests, clients, args.overload, per_second=2 * capacity)
            figures["overload"] = {
                "clients": clients,
                "capacity_per_s": capacity,
                **flood.figures(),
                "longest_s": round(max(flood.took_s), 2),
                "memory_mb": memory.result(),
            }
    return figures


def watch(process: psutil.Process, seconds: float, times: int = 10) -> list[int]:
    """Return the resident memory in MB now and at `times` equal intervals within `seconds`."""
    found = [round(resident_mb(process))]
    for _ in range(times):
        time.sleep(0.99 * seconds / times)  # over before the load is
        found.append(round(resident_mb(process)))
    return found


_FIVE_SECONDS = {"ESPALIER_PREDICT_DEADLINE_S": "5"}


def peers(args: argparse.Namespace, size: int, port: int, files: Sequence[bytes]) -> list[Server]:
    """Return the servers of LitServe and BentoML, which run in another Python environment."""
    environment = {
        "PEER_NETWORK": args.backbone.value,
        "PEER_SIZE": str(size),
        "PEER_BATCH": "8",
        "PEER_PORT": str(port),
        "KERAS_BACKEND": "tensorflow",
        "BENTOML_DO_NOT_TRACK": "true",
        "PYTHONPATH": str(_PEERS),
    }
    python = args.peers.absolute()
    lit = [str(python), "litserve_app.py"]
    bento = [str(python.with_name("bentoml")), "serve", "bentoml_app:Classifier", "--port", str(port)]
    forms = [form("/predict", "images", file) for file in files]
    return [
        Server("LitServe", "/health", lit, _PEERS, environment, [_json(file) for file in files]),
        Server("BentoML", "/readyz", bento, _PEERS, environment, forms),
    ]


def _json(file: bytes, model: int = 0) -> bytes:
    """Return the request that sends a file to LitServe."""
    body = {"image": base64.b64encode(file).decode(), "model": model}
    return post("/predict", json.dumps(body).encode(), "application/json")


def of_a_peer(litserve: Server, port: int, models: int, files: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """Return memory and requests per second of LitServe with one model and with many, each with its own network."""
    figures: dict[str, Any] = {"models": models}
    for count in (1, models):
        requests = [_json(files[number % len(files)], number % count) for number in range(max(count, len(files)))]
        several = replace(litserve, environment=litserve.environment | {"PEER_MODELS": str(count)}, requests=requests)
        with running(several, port) as process:
            load(port, requests, 8, 3600.0, most=max(count, 16))  # each once
            figures[str(count)] = {
                "per_second": round(load(port, requests, 8, seconds).per_second, 2),
                "memory_mb": round(resident_mb(process)),
            }
    return figures


def show(
    figures: dict[str, Any], found: dict[str, dict[int, list[Load]]], bare: Sequence[float], clients: Sequence[int]
) -> None:
    """Print the figures as rows for docs/benchmarks.md."""
    rates = {
        server: {count: spread([one.per_second for one in many]) for count, many in of_server.items()}
        for server, of_server in found.items()
    }
    rows = []
    for count in clients:
        for server, of_server in rates.items():
            rate = of_server[count]
            took = spread([1000 * float(np.median(one.took_s)) for one in found[server][count]])
            measured = f"{rate['median']:.1f} requests/s ({rate['min']:.1f} to {rate['max']:.1f})"
            rows.append((f"{server}, {count} clients", f"{measured}, median {took['median']:.0f} ms", ""))
        ours = rates[_OURS][count]["median"]
        others = [of_server[count]["median"] for server, of_server in rates.items() if not server.startswith(_OURS)]
        for server in [server for server in rates if server.startswith(_OURS)] if others else []:
            against = f"{rates[server][count]['median'] / max(others):.2f}"
            rows.append((f"{server} against the best of the others, {count} clients", against, _AIMS[server]))
        against_bare = f"{ours / statistics.median(bare):.2f}"
        rows.append((f"against the bare engine, {count} clients", against_bare, "0.9 at 8"))
    alone = figures["alone_ms"]
    if 1 in clients:
        added = statistics.median(1000 * float(np.median(one.took_s)) for one in found[_OURS][1]) - alone
        rows.append((f"added to {alone:.0f} ms of decoding and engine, 1 client", f"{added:.1f} ms", "5 ms"))
    many, alias = figures["many_models"], figures["alias"]
    against_one = f"{many['rate_against_one']['median']:.2f}, {many['more_memory_mb']:+.0f} MB"
    rows.append((f"{many['models']} models on one backbone against one", against_one, "0.95, +150 MB"))
    seen = f"seen after {alias['seen_after_s']['max']:.2f} s at most, {alias['failed']} requests failed"
    rows.append((f"an alias moved {alias['moves']} times under load", seen, "1 s, 0"))
    if "many_models_of_a_peer" in figures:
        peer = figures["many_models_of_a_peer"]
        one, several = peer["1"], peer[str(peer["models"])]
        said = f"{several['per_second'] / one['per_second']:.2f}, {several['memory_mb'] - one['memory_mb']:+,} MB"
        rows.append((f"{peer['models']} models in LitServe, a network each, against one", said, ""))
    table(rows, f"{len(os.sched_getaffinity(0))} processors ({processor()})")


if __name__ == "__main__":
    main()
