"""Closes a listening socket without losing the clients that have just connected to it. Knows no server.

Closing a listening socket resets the connections in its backlog, and their requests are lost. So the port first stops
accepting, then the server serves the backlog, and only then the socket is closed. A client that connects in between
retries after a second, as TCP does, and is refused then.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from contextlib import suppress

# Within this time, a client that sends one request after the other sees `Connection: close`. Idle clients lose nothing.
DRAIN_S = 1.0
# Within this time, the server accepts the connections in the backlog.
ACCEPT_BACKLOG_S = 0.5

_SO_ATTACH_FILTER = 26  # linux/asm-generic/socket.h
# A program of one instruction for the kernel's packet filter: drop every packet.
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))


def stop_accepting(listening: int) -> None:
    """Make the kernel ignore new connections to a listening socket; those in the backlog stay.

    `listening` is its file descriptor. Does nothing on systems other than Linux, or where the kernel refuses.
    """
    if sys.platform != "linux":
        return
    with socket.socket(fileno=os.dup(listening)) as duplicate, suppress(OSError):
        duplicate.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(_DROP)))
