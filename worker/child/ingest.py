"""Reads an uploaded archive, inside a child process: decoders of strangers' files run here and nowhere else."""

from __future__ import annotations

import resource
from pathlib import Path

from artifacts import images, layout
from artifacts.archive import Archive, open_archive
from artifacts.layout import Layout
from artifacts.store import Store
from errors import DatasetRefused, ImageRefused, Refused
from worker.child.channel import Channel
from worker.messages import ImageAccepted, ImageBegun, ImageRejected, IngestOrder, LayoutFound


def ingest(order: IngestOrder, channel: Channel) -> None:
    """Read an archive: store each image that can be used, and report what is known of it.

    Sends LayoutFound once, then for each image ImageBegun and ImageAccepted or ImageRejected. An image that kills this
    process is the last one that was begun; the worker then orders the rest from a new process.
    """
    resource.setrlimit(resource.RLIMIT_AS, (order.memory_bytes, order.memory_bytes))
    store = Store(Path(order.store), is_durable=False)  # the worker syncs what it takes over
    archive = open_archive(store.verified_path(order.archive), order.archive_limits)
    found = _layout(archive)
    done = set(order.done)
    channel.send(
        LayoutFound(
            task=found.task,
            samples=len(found.samples),
            ignored=archive.ignored,
            refused=found.refused,
        )
    )
    samples = {sample.path: sample for sample in found.samples if sample.path not in done}
    for path, data in archive.read(samples.keys()):
        channel.send(ImageBegun(path=path))
        _limit_cpu(order.decode_cpu_s)
        try:
            if isinstance(data, Refused):
                channel.send(ImageRejected(path=path, reason=data.reason))
                continue
            facts = images.inspect(data, order.image_limits)
        except ImageRefused as error:
            channel.send(ImageRejected(path=path, reason=error.detail))
            continue
        sample = samples[path]
        channel.send(
            ImageAccepted(
                path=path,
                sha256=store.put(data),
                size_bytes=len(data),
                facts=facts,
                labels=sample.labels,
                target=sample.target,
                group=sample.group,
                split=sample.split,
            )
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
    """Have the kernel end this process if the next image takes more than so many seconds of processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds + 1, resource.RLIM_INFINITY))
