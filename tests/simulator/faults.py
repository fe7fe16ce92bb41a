"""All randomness of a schedule, from one seed: which faults it has and how often each strikes; counts them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import TypeVar

T = TypeVar("T")


class Fault(StrEnum):
    """Kinds of faults, and actions of clients at a bad moment."""

    # of a machine
    CRASH = "worker crashed"
    API_CRASH = "API crashed"
    FREEZE = "machine frozen"
    SLOW = "thread slow"
    DRAIN = "worker drained"
    JOIN = "worker joined"
    CLOCK_JUMP = "monotonic clock jumped"
    WALL_JUMP = "wall clock jumped"
    # of the database
    CUT_BEFORE = "connection cut before COMMIT"
    CUT_AFTER = "answer to COMMIT lost"
    CUT_READING = "connection cut while reading"
    OUTAGE = "database away"
    PARTITION = "one machine cut off"
    DATABASE_FULL = "database full"
    # of the broker
    MESSAGE_LOST = "message lost"
    MESSAGE_DOUBLED = "message delivered twice"
    MESSAGE_LATE = "message late"
    BROKER_AWAY = "broker away"
    BROKER_EMPTIED = "broker lost its messages"
    # of the work
    BROKEN = "work failed for good"
    PASSING = "work failed for now"
    MEMORY = "work out of memory"
    DISK_FULL = "disk full"
    STORE_AWAY = "store away"
    HANG = "work hung"
    MLFLOW_AWAY = "MLflow away"
    MLFLOW_DEAF = "answer of MLflow lost"
    # by clients
    CANCEL = "run cancelled"
    CANCEL_ALL = "comparison cancelled"
    RETRY = "run tried again"


# Probability of each fault per occasion (transaction, step of work, message and so on) in a schedule that has it.
_TYPICAL = {
    Fault.CRASH: 0.008,
    Fault.API_CRASH: 0.1,
    Fault.FREEZE: 0.15,
    Fault.SLOW: 0.03,
    Fault.DRAIN: 0.1,
    Fault.JOIN: 0.05,
    Fault.CLOCK_JUMP: 0.1,
    Fault.WALL_JUMP: 0.1,
    Fault.CUT_BEFORE: 0.02,
    Fault.CUT_AFTER: 0.03,
    Fault.CUT_READING: 0.02,
    Fault.OUTAGE: 0.06,
    Fault.PARTITION: 0.08,
    Fault.DATABASE_FULL: 0.05,
    Fault.MESSAGE_LOST: 0.4,
    Fault.MESSAGE_DOUBLED: 0.2,
    Fault.MESSAGE_LATE: 0.3,
    Fault.BROKER_AWAY: 0.08,
    Fault.BROKER_EMPTIED: 0.08,
    Fault.BROKEN: 0.05,
    Fault.PASSING: 0.1,
    Fault.MEMORY: 0.05,
    Fault.DISK_FULL: 0.02,
    Fault.STORE_AWAY: 0.02,
    Fault.HANG: 0.02,
    Fault.MLFLOW_AWAY: 0.2,
    Fault.MLFLOW_DEAF: 0.2,
    Fault.CANCEL: 0.4,
    Fault.CANCEL_ALL: 0.4,
    Fault.RETRY: 0.7,
}


class Chance:
    """The seeded random source of one schedule. It turns half of the faults off, so that the others strike often."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._rates = {
            fault: rate * self._random.uniform(0.3, 3.0) if self._random.random() < 0.5 else 0.0
            for fault, rate in _TYPICAL.items()
        }
        self.happened: Counter[Fault] = Counter()

    def stop_faults(self) -> None:
        """Disable all faults from now on."""
        self._rates = dict.fromkeys(self._rates, 0.0)

    def strikes(self, fault: Fault) -> bool:
        """Return whether a fault strikes now, and count it in `happened` if it does."""
        rate = self._rates[fault]
        if rate == 0.0 or self._random.random() >= rate:
            return False
        self.happened[fault] += 1
        return True

    def happens(self, probability: float) -> bool:
        """Return True with this probability."""
        return self._random.random() < probability

    def seconds(self, low: float, high: float) -> float:
        """Return a uniformly random duration in seconds."""
        return self._random.uniform(low, high)

    def integer(self, low: int, high: int) -> int:
        """Return a random integer from low to high, both included."""
        return self._random.randint(low, high)

    def choice(self, things: Sequence[T]) -> T:
        """Return a random element of a sequence."""
        return self._random.choice(things)
