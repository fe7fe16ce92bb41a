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
_POLL_S = 0.0005


class MachineKilled(BaseException):
    """The machine of this thread is no more: it unwinds and touches nothing on its way."""


class ThreadGroup:
    """What the tasks of one machine have in common: they are frozen together, and killed together."""

    def __init__(self) -> None:
        self.frozen_until = 0.0
        self.is_off = False
        self.threads: list[VirtualThread] = []


class VirtualThread:
    """Something that runs in a thread of its own, by turns with others."""

    def __init__(self, scheduler: Scheduler, run: Callable[[], None], name: str, group: ThreadGroup) -> None:
        self.name = name
        self.thread_group = group
        self.parent = scheduler.current
        self.ended = VirtualEvent(scheduler)
        self.turn = threading.Lock()
        self.turn.acquire()
        # Counted up whenever it waits for something else: a call to go on with what is no longer awaited is stale.
        self.ticket = 0
        self._scheduler = scheduler
        self._run = run

    def start(self) -> None:
        """Let it run as soon as it is its turn."""
        self.thread_group.threads.append(self)
        self._scheduler.start(self, self._run)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        self.ended.wait(timeout)


class VirtualEvent:
    """A `threading.Event` in simulated time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_set = False
        self._waiting: list[VirtualThread] = []

    def is_set(self) -> bool:
        """Return whether it is raised."""
        return self._is_set

    def set(self) -> None:
        """Raise it; whoever waits goes on."""
        self._is_set = True
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            self._scheduler.wake(thread)

    def clear(self) -> None:
        """Lower it."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is raised, or for so long; say whether it was raised."""
        self._scheduler.check_alive()
        if self._is_set:
            return True
        me = self._scheduler.current
        self._waiting.append(me)
        self._scheduler.wait(math.inf if timeout is None else timeout)
        if me not in self._waiting:
            return True
        self._waiting.remove(me)
        return False


class Scheduler:
    """Simulated time, in seconds from 0, and whose turn it is. The thread that made it is a task as well."""

    def __init__(self, pool: ThreadPool) -> None:
        self.now = 0.0
        self._pool = pool
        self._due: list[tuple[float, int, VirtualThread, int]] = []
        self._numbers = itertools.count()
        self._failure: BaseException | None = None
        self._pending: list[_PendingCall] = []
        self.waits = 0
        self.current: VirtualThread = None  # type: ignore[assignment]  # for the moment in which the first task is made
        self._main = self.current = VirtualThread(self, _nothing, "main", ThreadGroup())

    # --- what a task does -------------------------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Let others go on for this long, or until called. Raises Gone on a machine that was killed."""
        self.check_alive()
        me = self.current
        self._wake_at(self.now + seconds, me)
        successor = self._next_thread()
        if successor is not me:
            successor.turn.release()
            me.turn.acquire()
        if me is self._main and self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        self.check_alive()

    def check_alive(self) -> None:
        """Raise Gone on a machine that was killed."""
        if self.current.thread_group.is_off:
            raise MachineKilled

    def wake(self, thread: VirtualThread) -> None:
        """Have a task go on now."""
        self._wake_at(self.now, thread)

    def fail(self, error: BaseException) -> None:
        """Have the director raise this, if nothing went wrong before; it is its turn next."""
        self._failure = self._failure or error
        self._wake_at(-math.inf, self._main)

    def run_blocking(self, call: BlockingCall) -> None:
        """Make a call that may have to wait for what another task holds; others go on for as long as it does.

        Raises what the call does, and Gone on a machine that was killed.
        """
        pending = _PendingCall(self.current, call)
        self._pool.run(pending.make, _nothing)
        while not pending.is_done.wait(_POLL_S):
            if call.blockers():
                self._pending.append(pending)
                self.waits += 1
                self._next_thread().turn.release()
                pending.thread.turn.acquire()
                break
        if pending in self._pending:  # its machine was killed meanwhile
            self._pending.remove(pending)
            call.give_up()
        pending.is_done.wait()
        self.check_alive()
        if pending.error is not None:
            raise pending.error

    # --- machines ---------------------------------------------------------------------------------------------------

    def kill(self, group: ThreadGroup) -> None:
        """Have all tasks of a machine unwind where they are. Raises Gone if this one is among them."""
        group.is_off = True
        group.frozen_until = 0.0
        for thread in group.threads:
            if not thread.ended.is_set() and thread is not self.current:
                self.wake(thread)
        self.check_alive()

    # --- for threads ------------------------------------------------------------------------------------------------

    def start(self, thread: VirtualThread, run: Callable[[], None]) -> None:
        """Give a task a thread."""
        context = contextvars.Context()

        def work() -> None:
            thread.turn.acquire()
            try:
                with suppress(MachineKilled):
                    self.check_alive()
                    context.run(run)
            except BaseException as error:
                self.fail(error)
            thread.ended.set()
            thread.thread_group.threads.remove(thread)

        self._pool.run(work, self._switch)
        self.wake(thread)

    def _switch(self) -> None:
        self._next_thread().turn.release()

    def _wake_at(self, at: float, thread: VirtualThread) -> None:
        thread.ticket += 1
        if at < math.inf:
            heapq.heappush(self._due, (at, next(self._numbers), thread, thread.ticket))

    def _wake_unblocked(self) -> None:
        """See which of those that wait for others go on by now; of those that wait in a circle, one must."""
        while True:
            waiting = {
                pending.call.number: pending.call.blockers()
                for pending in self._pending
                if not pending.is_done.is_set()
            }
            if all(waiting.values()) and not any(_is_in_circle(number, waiting) for number in waiting):
                break
            time.sleep(_POLL_S)
        for pending in [pending for pending in self._pending if pending.is_done.is_set()]:
            self._pending.remove(pending)
            self.wake(pending.thread)

    def _next_thread(self) -> VirtualThread:
        """Let time pass until a task is due; it is the current one then."""
        if self._pending:
            self._wake_unblocked()
        while True:
            at, _, thread, ticket = heapq.heappop(self._due)
            if ticket != thread.ticket or thread.ended.is_set():
                continue
            if thread.thread_group.frozen_until > max(at, self.now):
                heapq.heappush(self._due, (thread.thread_group.frozen_until, next(self._numbers), thread, ticket))
                continue
            self.now = max(self.now, at)
            self.current = thread
            return thread


class BlockingCall(Protocol):
    """Something outside of simulated time that waits for as long as another task holds what it needs."""

    number: int

    def make(self) -> None:
        """Do it, in whatever thread."""

    def blockers(self) -> set[int]:
        """Return the numbers of the calls, or of whoever made them, that this one waits for; none if it goes on."""

    def give_up(self) -> None:
        """Have it end at once: nobody wants it any more."""


class _PendingCall:
    """A call on its way, and the task that it is made for."""

    def __init__(self, thread: VirtualThread, call: BlockingCall) -> None:
        self.thread = thread
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
    """Return whether a call waits for itself in the end."""
    found: set[int] = set()
    left = set(waiting[number])
    while left:
        other = left.pop()
        if other not in found:
            found.add(other)
            left |= waiting.get(other, set())
    return number in found


class ThreadPool:
    """Threads of the machine that this runs on, used again and again: starting one takes longer than most tasks."""

    def __init__(self) -> None:
        self._idle: list[_PoolThread] = []

    def close(self) -> None:
        """Let them go."""
        for worker in self._idle:
            worker.assign(None)

    def run(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Have a thread do some work, and something else once it is free for the next."""
        worker = self._idle.pop() if self._idle else _PoolThread()

        def run() -> None:
            work()
            self._idle.append(worker)
            then()

        worker.assign(run)


class _PoolThread:
    def __init__(self) -> None:
        self._work: Callable[[], None] | None = None
        self._ready = threading.Semaphore(0)
        threading.Thread(target=self._run, name="simulator", daemon=True).start()

    def assign(self, work: Callable[[], None] | None) -> None:
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
