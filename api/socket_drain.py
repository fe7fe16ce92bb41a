"""Closes a port so that nobody is lost who has just connected to it. Knows no server.

Closing a listening socket resets the connections that wait in it, and their requests with them. So first it takes no
more, then what waits is taken, and then it is closed; who comes meanwhile knocks again a second later and is refused.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from contextlib import suppress

# A client that sends one request after the other comes to know within this that the service ends, and one that is idle
# loses nothing.
DRAIN_S = 1.0
# Connections that wait are taken within this.
ACCEPT_BACKLOG_S = 0.5

_SO_ATTACH_FILTER = 26  # linux/asm-generic/socket.h
# One instruction of the kernel's packet filter: of every packet keep nothing.
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))


def stop_accepting(listening: int) -> None:
    """Have the kernel answer nobody who wants to connect to a listening socket, in whatever processes it is open.

    `listening` is its file descriptor. Where the kernel cannot, all stays as it is.
    """
    if sys.platform != "linux":
        return
    with socket.socket(fileno=os.dup(listening)) as same, suppress(OSError):
        same.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(_DROP)))
