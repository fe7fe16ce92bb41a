"""Stops a listening socket from accepting connections, so that it can be closed without losing requests.

Closing a listening socket resets the connections in its backlog, and their requests are lost. So the server first makes
the kernel ignore new connections, then serves the backlog, and then closes the socket. If a client tries to connect
before that, TCP tries again after a second, when the port is closed and refuses the connection.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from contextlib import suppress

# Seconds between SIGTERM and the shutdown. In this time, every client that keeps sending requests gets an answer with
# `Connection: close`. Idle clients lose nothing.
DRAIN_S = 1.0
# Seconds in which the server accepts the connections in the backlog.
ACCEPT_BACKLOG_S = 0.5

_SO_ATTACH_FILTER = 26  # linux/asm-generic/socket.h
# A program for the kernel's packet filter (BPF), with one instruction: drop every packet.
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))


def stop_accepting(listening: int) -> None:
    """Make the kernel ignore new connections to a listening socket. Connections in its backlog stay.

    `listening` is the socket's file descriptor. Does nothing on other systems than Linux, or if the kernel refuses.
    """
    if sys.platform != "linux":
        return
    with socket.socket(fileno=os.dup(listening)) as duplicate, suppress(OSError):
        duplicate.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(_DROP)))
