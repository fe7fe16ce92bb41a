"""Threads that take turns in simulated time: one runs at a time, and when it waits another goes on. Knows no jobs.

The code that runs here is real and knows nothing of it: its clock, flags and threads are these. Which thread goes next
follows from what each waits for, and so from the seed alone; nothing depends on how fast the machine is. A task
belongs to a machine, which may be frozen or killed with all that runs on it.
"""

from __future__ import annotations

import contextvars
import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

# How long to look away from what is outside of simulated time.
_A_MOMENT_S = 0.0005


class Gone(BaseException):
    """The machine of this thread is no more: it unwinds and touches nothing on its way."""


class Power:
    """What the tasks of one machine have in common: they are frozen together, and killed together."""

    def __init__(self) -> None:
        self.frozen_until = 0.0
        self.is_off = False
        self.tasks: list[Task] = []


class Task:
    """Something that runs in a thread of its own, by turns with others."""

    def __init__(self, baton: Baton, run: Callable[[], None], name: str, power: Power) -> None:
        self.name = name
        self.power = power
        self.parent = baton.current
        self.ended = Flag(baton)
        self.turn = threading.Lock()
        self.turn.acquire()
        # Counted up whenever it waits for something else: a call to go on with what is no longer awaited is stale.
        self.ticket = 0
        self._baton = baton
        self._run = run

    def start(self) -> None:
        """Let it run as soon as it is its turn."""
        self.power.tasks.append(self)
        self._baton.begin(self, self._run)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        self.ended.wait(timeout)


class Flag:
    """A `threading.Event` in simulated time."""

    def __init__(self, baton: Baton) -> None:
        self._baton = baton
        self._is_set = False
        self._waiting: list[Task] = []

    def is_set(self) -> bool:
        """Say whether it is raised."""
        return self._is_set

    def set(self) -> None:
        """Raise it; whoever waits goes on."""
        self._is_set = True
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            self._baton.call(task)

    def clear(self) -> None:
        """Lower it."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is raised, or for so long; say whether it was raised."""
        self._baton.see_power()
        if self._is_set:
            return True
        me = self._baton.current
        self._waiting.append(me)
        self._baton.wait(math.inf if timeout is None else timeout)
        if me not in self._waiting:
            return True
        self._waiting.remove(me)
        return False


class Baton:
    """Simulated time, in seconds from 0, and whose turn it is. The thread that made it is a task as well."""

    def __init__(self, hands: Hands) -> None:
        self.now = 0.0
        self._hands = hands
        self._due: list[tuple[float, int, Task, int]] = []
        self._numbers = itertools.count()
        self._failure: BaseException | None = None
        self._stuck: list[_Stuck] = []
        self.waits = 0
        self.current: Task = None  # type: ignore[assignment]  # for the moment in which the first task is made
        self._director = self.current = Task(self, _nothing, "director", Power())

    # --- what a task does -------------------------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Let others go on for this long, or until called. Raises Gone on a machine that was killed."""
        self.see_power()
        me = self.current
        self._call_at(self.now + seconds, me)
        successor = self._next()
        if successor is not me:
            successor.turn.release()
            me.turn.acquire()
        if me is self._director and self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        self.see_power()

    def see_power(self) -> None:
        """Raise Gone on a machine that was killed."""
        if self.current.power.is_off:
            raise Gone

    def call(self, task: Task) -> None:
        """Have a task go on now."""
        self._call_at(self.now, task)

    def fail(self, error: BaseException) -> None:
        """Have the director raise this, if nothing went wrong before; it is its turn next."""
        self._failure = self._failure or error
        self._call_at(-math.inf, self._director)

    def lend(self, call: Call) -> None:
        """Make a call that may have to wait for what another task holds; others go on for as long as it does.

        Raises what the call does, and Gone on a machine that was killed.
        """
        stuck = _Stuck(self.current, call)
        self._hands.take(stuck.make, _nothing)
        while not stuck.is_done.wait(_A_MOMENT_S):
            if call.blockers():
                self._stuck.append(stuck)
                self.waits += 1
                self._next().turn.release()
                stuck.task.turn.acquire()
                break
        if stuck in self._stuck:  # its machine was killed meanwhile
            self._stuck.remove(stuck)
            call.give_up()
        stuck.is_done.wait()
        self.see_power()
        if stuck.error is not None:
            raise stuck.error

    # --- machines ---------------------------------------------------------------------------------------------------

    def kill(self, power: Power) -> None:
        """Have all tasks of a machine unwind where they are. Raises Gone if this one is among them."""
        power.is_off = True
        power.frozen_until = 0.0
        for task in power.tasks:
            if not task.ended.is_set() and task is not self.current:
                self.call(task)
        self.see_power()

    # --- for threads ------------------------------------------------------------------------------------------------

    def begin(self, task: Task, run: Callable[[], None]) -> None:
        """Give a task a thread."""
        context = contextvars.Context()

        def work() -> None:
            task.turn.acquire()
            try:
                with suppress(Gone):
                    self.see_power()
                    context.run(run)
            except BaseException as error:
                self.fail(error)
            task.ended.set()
            task.power.tasks.remove(task)

        self._hands.take(work, self._hand_on)
        self.call(task)

    def _hand_on(self) -> None:
        self._next().turn.release()

    def _call_at(self, at: float, task: Task) -> None:
        task.ticket += 1
        if at < math.inf:
            heapq.heappush(self._due, (at, next(self._numbers), task, task.ticket))

    def _settle(self) -> None:
        """See which of those that wait for others go on by now; of those that wait in a circle, one must."""
        while True:
            waiting = {stuck.call.number: stuck.call.blockers() for stuck in self._stuck if not stuck.is_done.is_set()}
            if all(waiting.values()) and not any(_is_in_circle(number, waiting) for number in waiting):
                break
            time.sleep(_A_MOMENT_S)
        for stuck in [stuck for stuck in self._stuck if stuck.is_done.is_set()]:
            self._stuck.remove(stuck)
            self.call(stuck.task)

    def _next(self) -> Task:
        """Let time pass until a task is due; it is the current one then."""
        if self._stuck:
            self._settle()
        while True:
            at, _, task, ticket = heapq.heappop(self._due)
            if ticket != task.ticket or task.ended.is_set():
                continue
            if task.power.frozen_until > max(at, self.now):
                heapq.heappush(self._due, (task.power.frozen_until, next(self._numbers), task, ticket))
                continue
            self.now = max(self.now, at)
            self.current = task
            return task


class Call(Protocol):
    """Something outside of simulated time that waits for as long as another task holds what it needs."""

    number: int

    def make(self) -> None:
        """Do it, in whatever thread."""

    def blockers(self) -> set[int]:
        """Return the numbers of the calls, or of whoever made them, that this one waits for; none if it goes on."""

    def give_up(self) -> None:
        """Have it end at once: nobody wants it any more."""


class _Stuck:
    """A call on its way, and the task that it is made for."""

    def __init__(self, task: Task, call: Call) -> None:
        self.task = task
        self.call = call
        self.is_done = threading.Event()
        self.error: BaseException | None = None

    def make(self) -> None:
        try:
            self.call.make()
        except BaseException as error:
            self.error = error
        self.is_done.set()


def _is_in_circle(number: int, waiting: Mapping[int, set[int]]) -> bool:
    """Say whether a call waits for itself in the end."""
    found: set[int] = set()
    left = set(waiting[number])
    while left:
        other = left.pop()
        if other not in found:
            found.add(other)
            left |= waiting.get(other, set())
    return number in found


class Hands:
    """Threads of the machine that this runs on, used again and again: starting one takes longer than most tasks."""

    def __init__(self) -> None:
        self._idle: list[_Hand] = []

    def close(self) -> None:
        """Let them go."""
        for hand in self._idle:
            hand.take(None)

    def take(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Have a thread do some work, and something else once it is free for the next."""
        hand = self._idle.pop() if self._idle else _Hand()

        def run() -> None:
            work()
            self._idle.append(hand)
            then()

        hand.take(run)


class _Hand:
    def __init__(self) -> None:
        self._work: Callable[[], None] | None = None
        self._ready = threading.Semaphore(0)
        threading.Thread(target=self._run, name="hand", daemon=True).start()

    def take(self, work: Callable[[], None] | None) -> None:
        self._work = work
        self._ready.release()

    def _run(self) -> None:
        while True:
            self._ready.acquire()
            work = self._work
            if work is None:
                return
            work()


def _nothing() -> None:
    """Do nothing: the director's thread has begun before there was a baton."""
