"""The child process: reads orders from standard input, does the work, and sends messages to its worker.

The worker runs `python -m worker.child <descriptor>`. The child writes messages to this file descriptor and not to
standard output, where libraries may print. It exits at once when standard input closes, because then its worker is
gone.
"""

from __future__ import annotations

import os
import sys

from artifacts.store import disk_errors
from errors import EspalierError, OutOfMemory
from worker.child import compare, ingest, train, view
from worker.child.channel import Channel
from worker.messages import CompareOrder, Failed, IngestOrder, Order, TrainOrder


def main() -> int:
    """Carry out the orders of the worker; return the exit status of the process."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # a process that this one starts must not keep the pipe open
    channel = Channel(sys.stdin, os.fdopen(descriptor, "w", encoding="utf-8"))
    channel.listen()
    order = channel.next_order()
    try:
        with disk_errors():
            _carry_out(order, channel)
    except EspalierError as error:
        channel.send(Failed.by(error))
    except MemoryError:
        channel.send(Failed.by(OutOfMemory("The job needed more memory than it is allowed to use.")))
    return 0


def _carry_out(order: Order, channel: Channel) -> None:
    match order:
        case IngestOrder():
            ingest.ingest(order, channel)
        case TrainOrder():
            train.train(order, channel)
        case CompareOrder():
            compare.compare(order, channel)
        case _:
            view.compute(order, channel)


if __name__ == "__main__":
    sys.exit(main())
