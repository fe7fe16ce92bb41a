"""Reads an uploaded archive and decodes its images, inside a child process.

Uploaded files are decoded only here, because a malicious image may attack the decoder.
"""

from __future__ import annotations

import resource
from pathlib import Path

from artifacts import images, layout
from artifacts.archive import Archive, open_archive
from artifacts.layout import Layout
from artifacts.store import Store, digest_of
from errors import DatasetRefused, ImageRefused, Refused
from worker.child.channel import Channel
from worker.messages import ImageAccepted, ImageBegun, ImageRejected, IngestOrder, LayoutFound


def ingest(order: IngestOrder, channel: Channel) -> None:
    """Read an archive, store its usable images and report each of them to the worker.

    Sends LayoutFound once. Then sends, for each image, ImageBegun and after it ImageAccepted or ImageRejected. If an
    image kills this process, the worker knows from ImageBegun which one, and a new process reads the other images.
    """
    resource.setrlimit(resource.RLIMIT_AS, (order.memory_bytes, order.memory_bytes))
    store = Store(Path(order.store))
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
        # The digest lets the worker remove the stored file if it stops this process before ImageAccepted.
        channel.send(ImageBegun(path=path, sha256=None if isinstance(data, Refused) else digest_of(data)))
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
        raise DatasetRefused(f"labels.csv cannot be used: it is {data.reason}.")
    return layout.from_labels(data, labels, paths)


def _limit_cpu(seconds: int) -> None:
    """Let the kernel kill this process if it uses more than `seconds` of processor time from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds + 1, resource.RLIM_INFINITY))
