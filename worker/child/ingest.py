"""Reads an uploaded archive, inside a child process: decoders of strangers' files run here and nowhere else."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from artifacts import images, layout
from artifacts.archive import Archive, ArchiveLimits, open_archive
from artifacts.images import ImageLimits
from artifacts.layout import Layout
from artifacts.store import Digest, Store, digest_of
from errors import DatasetRefused, ImageRefused, Refused
from worker.child.channel import Channel


def ingest(order: Mapping[str, Any], channel: Channel) -> None:
    """Read an archive: store each image that can be used and say what is known of it.

    Sends `layout` once, then for each image `reading` and `accepted` or `refused`. An image that kills this process
    was the last one `reading`; the worker then orders the rest from a new process.
    """
    resource.setrlimit(resource.RLIMIT_AS, (order["memory_bytes"], order["memory_bytes"]))
    store = Store(Path(order["store"]))
    limits = ImageLimits(**{**order["image_limits"], "formats": tuple(order["image_limits"]["formats"])})
    archive = open_archive(store.verified_path(Digest(order["archive"])), ArchiveLimits(**order["archive_limits"]))
    found = _layout(archive)
    done = set(order["done"])
    channel.send(
        "layout",
        task=found.task,
        samples=len(found.samples),
        ignored=archive.ignored,
        refused=[vars(file) for file in found.refused],
    )
    samples = {sample.path: sample for sample in found.samples if sample.path not in done}
    for path, data in archive.read(samples.keys()):
        # With its digest, so that the worker knows of every file that may lie in the store if it stops us now.
        channel.send("reading", path=path, sha256=None if isinstance(data, Refused) else digest_of(data))
        _limit_cpu(order["decode_cpu_s"])
        try:
            if isinstance(data, Refused):
                channel.send("refused", path=path, reason=data.reason)
                continue
            facts = images.inspect(data, limits)
        except ImageRefused as error:
            channel.send("refused", path=path, reason=error.detail)
            continue
        sample = samples[path]
        channel.send(
            "accepted",
            path=path,
            sha256=store.put(data),
            size_bytes=len(data),
            facts=asdict(facts),
            labels=sample.labels,
            target=sample.target,
            group=sample.group,
            split=sample.split,
        )


def _layout(archive: Archive) -> Layout:
    paths = [entry.path for entry in archive.entries]
    labels = layout.labels_file(paths)
    if labels is None:
        return layout.from_folders(paths)
    _, data = next(archive.read({labels}))
    if isinstance(data, Refused):
        raise DatasetRefused(f"labels.csv is {data.reason}.")
    return layout.from_labels(data, labels, paths)


def _limit_cpu(seconds: int) -> None:
    """Let the kernel end this process if it burns that much processor time on the next image."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds + 1, resource.RLIM_INFINITY))
