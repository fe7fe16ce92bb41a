"""The process that does one job, or several about one run: reads orders from standard input, sends messages, ends.

Run as `python -m worker.child <descriptor>`: that open file takes the messages, so that nothing which a library prints
looks like one. Ends at once when standard input closes, since then its worker is gone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from artifacts.store import disk_errors
from errors import EspalierError, OutOfMemory
from worker.child import compare, ingest, train, view
from worker.child.channel import Channel

_ORDERS: Mapping[str, Callable[[Mapping[str, Any], Channel], None]] = {
    "ingest": ingest.ingest,
    "train": train.train,
    "compare": compare.compare,
    "view": view.look,
}


def main() -> int:
    """Do what the order says."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # what this process starts must not keep the pipe open after its end
    channel = Channel(sys.stdin, os.fdopen(descriptor, "w", encoding="utf-8"))
    channel.listen()
    order = channel.next_order()
    try:
        with disk_errors():
            _ORDERS[order["kind"]](order, channel)
    except EspalierError as error:
        channel.send("error", error=error.record())
    except MemoryError:
        channel.send("error", error=OutOfMemory("The work took more memory than it may.").record())
    return 0


if __name__ == "__main__":
    sys.exit(main())
