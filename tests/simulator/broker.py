"""The broker of a schedule: it carries messages late, twice or not at all, loses those that wait, and may be away."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from models.job import Queue
from simulator.faults import Fault
from simulator.simulation import Simulation
from simulator.virtual_threads import VirtualEvent

_LATE_S = 60.0
_FETCH_EVERY_S = 5.0


class BrokerAway(Exception):
    """The broker does not answer."""


class SimulatedBroker:
    """Holds messages by queue, in their order."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._waiting: dict[str, list[str]] = {queue.value: [] for queue in Queue}
        self._has_arrived = VirtualEvent(simulation.scheduler)
        self.away_until = 0.0

    # --- as dispatchers see it ---------------------------------------------------------------------------------------

    def count_waiting(self, queue: str) -> int:
        """Return how many messages of a queue no worker has fetched yet."""
        self._reach()
        return len(self._waiting[queue])

    def send(self, queue: str, kind: str, job_id: str) -> None:
        """Take a message in, perhaps."""
        self._reach()
        chance = self._simulation.chance
        if chance.strikes(Fault.MESSAGE_LOST):
            return
        for _ in range(2 if chance.strikes(Fault.MESSAGE_DOUBLED) else 1):
            if chance.strikes(Fault.MESSAGE_LATE):
                self._simulation.spawn(partial(self._deliver_late, queue, job_id), "message")
            else:
                self._deliver(queue, job_id)

    def close(self) -> None:
        """Do nothing: connections cost nothing here."""

    # --- as workers see it -------------------------------------------------------------------------------------------

    def fetch(self, queues: Sequence[Queue]) -> str | None:
        """Return the job id of the next message of some queues; None if there was none for a while."""
        if self._simulation.scheduler.now >= self.away_until:
            for queue in queues:
                if self._waiting[queue.value]:
                    return self._waiting[queue.value].pop(0)
        self._has_arrived.clear()
        self._has_arrived.wait(_FETCH_EVERY_S)
        return None

    # --- faults ------------------------------------------------------------------------------------------------------

    def lose_all(self) -> None:
        """Lose every message that waits, as a broker does that keeps nothing on disk."""
        for waiting in self._waiting.values():
            waiting.clear()

    def _reach(self) -> None:
        if self._simulation.scheduler.now < self.away_until:
            raise BrokerAway("The broker does not answer.")

    def _deliver(self, queue: str, job_id: str) -> None:
        self._waiting[queue].append(job_id)
        self._has_arrived.set()

    def _deliver_late(self, queue: str, job_id: str) -> None:
        self._simulation.scheduler.wait(self._simulation.chance.seconds(0.0, _LATE_S))
        self._deliver(queue, job_id)
