"""Virtual threads in simulated time: only one runs at a time, and when it waits, the next one runs. Knows no jobs.

The code under test runs unchanged with these clocks, events and threads. Which thread runs next follows from what each
waits for, and so only from the seed, never from the speed of the real machine. A thread belongs to the group of a
simulated machine, which can be frozen or killed as a whole.
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

# Real seconds between checks of calls outside of simulated time.
_POLL_S = 0.0005


class MachineKilled(BaseException):
    """The machine of this thread was killed: the thread unwinds without any further effect."""


class ThreadGroup:
    """The threads of one machine, which are frozen and killed together."""

    def __init__(self) -> None:
        self.frozen_until = 0.0
        self.is_off = False
        self.threads: list[VirtualThread] = []


class VirtualThread:
    """A real thread that runs only while the scheduler gives it the turn."""

    def __init__(self, scheduler: Scheduler, run: Callable[[], None], name: str, group: ThreadGroup) -> None:
        self.name = name
        self.thread_group = group
        self.parent = scheduler.current
        self.ended = VirtualEvent(scheduler)
        self.turn = threading.Lock()
        self.turn.acquire()
        # Incremented at each wait: a wake-up with an older ticket is stale.
        self.ticket = 0
        self._scheduler = scheduler
        self._run = run

    def start(self) -> None:
        """Make it due now, so that it runs when the scheduler gives it the turn."""
        self.thread_group.threads.append(self)
        self._scheduler.start(self, self._run)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, at most for `timeout` simulated seconds."""
        self.ended.wait(timeout)


class VirtualEvent:
    """A `threading.Event` in simulated time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_set = False
        self._waiting: list[VirtualThread] = []

    def is_set(self) -> bool:
        """Return whether the event is set."""
        return self._is_set

    def set(self) -> None:
        """Set the event and wake all waiting threads."""
        self._is_set = True
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            self._scheduler.wake(thread)

    def clear(self) -> None:
        """Reset the event, so that `wait` blocks again."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the event is set, at most for `timeout` simulated seconds; return whether it was set."""
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
    """Simulated time in seconds from 0, and the turn of threads. The creating thread takes turns as the main thread."""

    def __init__(self, pool: ThreadPool) -> None:
        self.now = 0.0
        self._pool = pool
        self._due: list[tuple[float, int, VirtualThread, int]] = []
        self._numbers = itertools.count()
        self._failure: BaseException | None = None
        self._pending: list[_PendingCall] = []
        self.waits = 0
        self.current: VirtualThread = None  # type: ignore[assignment]  # only until the main thread is created
        self._main = self.current = VirtualThread(self, _nothing, "main", ThreadGroup())

    # --- called by the running thread --------------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Let other threads run for this long, or until woken. Raises MachineKilled."""
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
        """Raise MachineKilled if the machine of the running thread was killed."""
        if self.current.thread_group.is_off:
            raise MachineKilled

    def wake(self, thread: VirtualThread) -> None:
        """Make a waiting thread due now."""
        self._wake_at(self.now, thread)

    def fail(self, error: BaseException) -> None:
        """Make the main thread run next and raise this error, or an earlier one if there is one."""
        self._failure = self._failure or error
        self._wake_at(-math.inf, self._main)

    def run_blocking(self, call: BlockingCall) -> None:
        """Make a call that may block on something that another thread holds; others run while it is blocked.

        Raises the error of the call, and MachineKilled.
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
        """Kill a machine: its threads unwind where they are. Raises MachineKilled in one of them."""
        group.is_off = True
        group.frozen_until = 0.0
        for thread in group.threads:
            if not thread.ended.is_set() and thread is not self.current:
                self.wake(thread)
        self.check_alive()

    # --- for threads ------------------------------------------------------------------------------------------------

    def start(self, thread: VirtualThread, run: Callable[[], None]) -> None:
        """Run a new virtual thread in a real thread of the pool."""
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
        """Wake the threads whose blocked call has ended; while calls deadlock, wait until the server aborts one."""
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
        """Advance time to the next due thread, make it the running one and return it."""
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
    """A call outside of simulated time that may block on something that another thread holds."""

    number: int

    def make(self) -> None:
        """Make the call, in any real thread."""

    def blockers(self) -> set[int]:
        """Return the numbers of the calls, or of idle connections, that block this one; empty if it is not blocked."""

    def give_up(self) -> None:
        """Abort the call, since its result is no longer needed."""


class _PendingCall:
    """A call that has not returned, and the thread that waits for it."""

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
    """Return whether a call is part of a deadlock: it waits for itself through others."""
    found: set[int] = set()
    left = set(waiting[number])
    while left:
        other = left.pop()
        if other not in found:
            found.add(other)
            left |= waiting.get(other, set())
    return number in found


class ThreadPool:
    """A pool of real threads: starting a thread takes longer than most virtual threads run."""

    def __init__(self) -> None:
        self._idle: list[_PoolThread] = []

    def close(self) -> None:
        """End the idle threads."""
        for worker in self._idle:
            worker.assign(None)

    def run(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Run `work` in a thread of the pool, then `then`, when the thread is available again."""
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
    """Do nothing: the main thread runs already when the scheduler is created."""
