"""The process that does one job, or several about one run: reads orders from standard input, sends messages, ends.

Run as `python -m worker.child <descriptor>`: that open file takes the messages, so that nothing which a library prints
looks like one. Ends at once when standard input closes, since then its worker is gone.
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
    """Carry out the orders that come; return the exit status."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # what this process starts must not keep the pipe open after its end
    channel = Channel(sys.stdin, os.fdopen(descriptor, "w", encoding="utf-8"))
    channel.listen()
    order = channel.next_order()
    try:
        with disk_errors():
            _carry_out(order, channel)
    except EspalierError as error:
        channel.send(Failed.by(error))
    except MemoryError:
        channel.send(Failed.by(OutOfMemory("The work took more memory than it may.")))
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
