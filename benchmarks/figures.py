"""Prints and stores the results of a benchmark. Imports no TensorFlow, because machines with a GPU may lack it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def report(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and write them to results/<name>.json, together with a description of this machine."""
    machine = {
        "processor": processor(),
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"benchmark": name, **figures, "machine": machine}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def table(rows: Sequence[tuple[str, str, str]], where: str) -> None:
    """Print (what, measured, aim) as rows for docs/benchmarks.md."""
    print("| what | measured | aim | where |\n|---|---|---|---|")
    for what, measured, aim in rows:
        print(f"| {what} | {measured} | {aim} | {where}, {datetime.now(UTC):%Y-%m-%d} |")


def processor() -> str:
    """Return the model name of the processor, or `unknown`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, minimum and maximum of measurements."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}
