"""Watches what every Python process of a service connects to and starts, whatever library does it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Python runs this before anything else. A process that is forked goes on in the file of its parent.
_WATCH = """
import json, os, sys

_EVENTS = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname",
           "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen")
_path = os.path.join(os.path.dirname(__file__), str(os.getpid()))
_file = os.open(_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

def _write(event, arguments):
    os.write(_file, json.dumps([os.getpid(), event, [repr(argument) for argument in arguments]]).encode() + b"\\n")

with open("/proc/self/cmdline") as _command:
    _write("started", _command.read().split("\\0")[:-1])
sys.addaudithook(lambda event, arguments: _write(event, arguments) if event in _EVENTS else None)
"""


@dataclass(frozen=True)
class Act:
    """One thing that a process did: its command, the audit event of Python, and the arguments of that as text."""

    command: str
    event: str
    arguments: list[str]


def watch(folder: Path) -> dict[str, str]:
    """Return the variables under which every Python process reports into a folder."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_WATCH)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def acts(folder: Path) -> list[Act]:
    """Return what was done until now."""
    found = []
    for file in folder.iterdir():
        if file.suffix == ".py" or file.name == "__pycache__":
            continue
        command = ""
        for line in file.read_text().splitlines():
            _, event, arguments = _parsed(line)
            if event == "started":
                command = " ".join(argument.strip("'") for argument in arguments)
            else:
                found.append(Act(command, event, arguments))
    return found


def _parsed(line: str) -> tuple[int, str, list[str]]:
    found: Any = json.loads(line)
    return found[0], found[1], found[2]
