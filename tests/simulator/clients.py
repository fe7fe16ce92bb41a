"""The clients of a schedule, and the API with its real routes. A client repeats a request until it is answered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from fastapi import Response

from api.dependencies import Services
from api.idempotency import IdempotentRequest
from api.routes import comparisons as comparison_routes
from api.routes import runs as run_routes
from api.schemas import ComparisonRequest, RunRequest
from dispatch import ThreadDispatcher
from errors import DiskFull, EspalierError, InFlight, NotReady, Unavailable
from models.project import Principal
from recipes.recipe import RANDOM, Folds, Mode, Recipe
from settings import Settings
from simulator.broker import SimulatedBroker
from simulator.faults import Fault
from simulator.machine import Machine
from simulator.simulation import Simulation
from simulator.workers import LIVE_S

T = TypeVar("T")
Request = Callable[[Services], T]

_PRINCIPAL = Principal()
_POLL_S = 3.0
_RETRIES = 2
_LONGEST_WAIT_S = 60.0
_TRANSACTIONS_POLL_S = 0.2


class Api:
    """The API process, and the network between it and its clients."""

    def __init__(self, simulation: Simulation, broker: SimulatedBroker, settings: Settings) -> None:
        self._simulation = simulation
        self._broker = broker
        self._settings = settings
        self.machine, self._dispatcher = self._start()

    def send(self, name: str, request: Request[T], key: str | None = None, cancels: str | None = None) -> T:
        """Send a request until it is answered. Raises the EspalierError with which the API answers."""
        while True:
            try:
                return self._send_one(name, request, key, cancels)
            except (Unavailable, DiskFull, InFlight):
                self._simulation.scheduler.wait(self._simulation.chance.seconds(0.5, 10.0))

    def _send_one(self, name: str, request: Request[T], key: str | None, cancels: str | None) -> T:
        machine, simulation = self.machine, self._simulation
        answer: list[T | EspalierError] = []

        def work() -> None:
            machine.may_crash()
            try:
                answer.append(self._answer(machine, request, key))
            except EspalierError as error:
                answer.append(error)
            finally:
                simulation.cancels.pop(task, None)

        task = machine.thread(work, name)
        if cancels is not None:
            simulation.cancels[task] = cancels
        task.start()
        task.join(simulation.chance.seconds(20.0, 60.0))
        if not answer:
            raise Unavailable("Nobody answers.")
        if isinstance(answer[0], EspalierError):
            simulation.log(f"API: {name}: {answer[0]}")
            raise answer[0]
        return answer[0]

    def _answer(self, machine: Machine, request: Request[T], key: str | None) -> T:
        # The routes used here need no other services.
        nothing = cast(Any, None)
        services = Services(self._settings, machine.database, self._simulation.store, self._dispatcher, *[nothing] * 7)
        if key is None:
            return request(services)
        with machine.database.exclusive(key) as is_held:
            if not is_held:
                raise InFlight("The same request is being answered.")
            return request(services)

    def _start(self) -> tuple[Machine, ThreadDispatcher]:
        def replace() -> None:
            self.machine, self._dispatcher = self._start()

        machine = Machine(self._simulation, "API", Fault.API_CRASH, replace)
        dispatcher = ThreadDispatcher(machine.database, self._broker, LIVE_S, machine.clock)
        dispatcher.start()
        return machine, dispatcher


class Client:
    """Starts a run or a comparison; may cancel it, and may retry a run that failed."""

    def __init__(self, simulation: Simulation, api: Api, number: int) -> None:
        self._simulation = simulation
        self._api = api
        self._number = number
        self._keys = 0
        self.runs_requested = 0

    def act(self) -> None:
        """Send all requests of this client, and wait for the end of its runs."""
        chance = self._simulation.chance
        self._simulation.scheduler.wait(chance.seconds(0.0, 10.0))
        if chance.happens(0.12):
            self._compare()
        else:
            self._follow(self._start_run())

    def _start_run(self) -> str:
        request = RunRequest(dataset=self._simulation.database.dataset_id, name=self._name, recipe=self._recipe())
        self.runs_requested += 1
        run = self._send_once(
            "start run",
            lambda services, idempotency: run_routes.start_run(Response(), services, _PRINCIPAL, request, idempotency),
        )
        return str(run.id)

    def _compare(self) -> None:
        chance = self._simulation.chance
        recipes = [self._recipe(k=2, epochs=epochs) for epochs in range(1, chance.choice([2, 2, 3]) + 1)]
        request = ComparisonRequest(dataset=self._simulation.database.dataset_id, name=self._name, recipes=recipes)
        self.runs_requested += len(recipes)
        comparison = self._send_once(
            "compare",
            lambda services, idempotency: comparison_routes.start_comparison(
                Response(), services, _PRINCIPAL, request, idempotency
            ),
        )
        mine = [
            run_id
            for run_id, owner in self._simulation.invariants.snapshot.comparison_of_run.items()
            if owner == comparison.id
        ]
        following = [self._simulation.spawn(partial(self._follow, run_id), f"client {self._number}") for run_id in mine]
        if chance.strikes(Fault.CANCEL_ALL):
            self._wait_at_random()
            cancel = partial(comparison_routes.cancel_comparison, principal=_PRINCIPAL, comparison_id=comparison.id)
            self._api.send("cancel", cancel, cancels=comparison.id)
        for task in following:
            task.join()

    def _follow(self, run_id: str) -> None:
        """Poll a run until it ends; maybe cancel or retry it."""
        chance = self._simulation.chance
        for _ in range(1 + _RETRIES):
            if chance.strikes(Fault.CANCEL):
                self._wait_at_random()
                cancel = partial(run_routes.cancel_run, principal=_PRINCIPAL, run_id=run_id)
                self._api.send("cancel", cancel, cancels=run_id)
            while not self._simulation.invariants.snapshot.runs[run_id].is_final:
                self._simulation.scheduler.wait(_POLL_S)
            if self._simulation.invariants.snapshot.runs[run_id].state != "failed" or not chance.strikes(Fault.RETRY):
                return
            self._simulation.scheduler.wait(chance.seconds(0.0, 5.0))
            self._retry(run_id)

    def _wait_at_random(self) -> None:
        """Wait for some time, or for some transactions: a request right after one is more likely to race with it."""
        chance, simulation = self._simulation.chance, self._simulation
        if chance.happens(0.5):
            simulation.scheduler.wait(chance.seconds(0.0, 40.0))
            return
        last, until = simulation.transactions + chance.integer(0, 40), simulation.scheduler.now + _LONGEST_WAIT_S
        while simulation.transactions < last and simulation.scheduler.now < until:
            simulation.scheduler.wait(_TRANSACTIONS_POLL_S)

    def _retry(self, run_id: str) -> None:
        try:
            self._send_once(
                "retry",
                lambda services, idempotency: run_routes.retry_run(
                    Response(), services, _PRINCIPAL, run_id, idempotency
                ),
            )
        except NotReady:
            return  # another client was faster

    def _send_once(self, name: str, request: Callable[[Services, IdempotentRequest], T]) -> T:
        """Send a request with an idempotency key, so that it acts once however often it is sent."""
        self._keys += 1
        key = f"{self._number}.{self._keys}"
        idempotency = partial(IdempotentRequest, principal=_PRINCIPAL, key=key, address=name)
        return self._api.send(name, lambda services: request(services, idempotency(services)), key)

    def _recipe(self, k: int | None = None, epochs: int = 1) -> Recipe:
        chance = self._simulation.chance
        mode = Mode.FINE_TUNING if chance.happens(0.6) else Mode.FEATURE_EXTRACTION
        return Recipe(mode=mode, weights=RANDOM, epochs=epochs, folds=Folds(k=k or chance.choice([2, 2, 3])))

    @property
    def _name(self) -> str:
        return f"model-{self._simulation.chance.integer(1, 2)}"
