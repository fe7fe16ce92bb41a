"""Reads an uploaded archive and decodes its images, inside a child process.

Uploaded files are decoded only here, because a malicious image may attack the decoder.
"""

from __future__ import annotations

import resource
from collections import Counter
from dataclasses import replace
from pathlib import Path

from artifacts import images, layout
from artifacts.archive import MIB, Archive, open_archive
from artifacts.layout import Layout
from artifacts.store import Store
from errors import DatasetRefused, ImageRefused, LayoutUnknown, Refused
from worker.child.channel import Channel
from worker.messages import ImageAccepted, ImageBegun, ImageRejected, IngestOrder, LayoutFound

# Annotations and tables that are looked at to name their format.
_NAMED_FILES, _NAMED_BYTES = 20, 16 * MIB


def ingest(order: IngestOrder, channel: Channel) -> None:
    """Read an archive, store its usable images and report each of them to the worker.

    Sends LayoutFound once. Then sends, for each image, ImageBegun and after it ImageAccepted or ImageRejected. If an
    image kills this process, the worker knows from ImageBegun which one, and a new process reads the other images.
    """
    resource.setrlimit(resource.RLIMIT_AS, (order.memory_bytes, order.memory_bytes))
    store = Store(Path(order.store), is_durable=False)  # the worker syncs what it takes over
    archive = open_archive(store.verified_path(order.archive), order.archive_limits, order.code_page)
    found = _layout(archive, order.code_page)
    unreadable = {file.path for file in archive.refused} - {entry.path for entry in archive.entries}
    readable = [sample for sample in found.samples if sample.path not in unreadable]
    done = set(order.done)
    channel.send(
        LayoutFound(
            task=found.task,
            samples=len(readable),
            classes=Counter(label for sample in found.samples for label in sample.labels),
            ignored=archive.ignored + found.ignored,
            refused=(*archive.refused, *(file for file in found.refused if file.path not in unreadable)),
            warnings=found.warnings,
        )
    )
    samples = {sample.path: sample for sample in readable if sample.path not in done}
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


def _layout(archive: Archive, code_page: str | None) -> Layout:
    """Return the layout of all files, those that the archive refuses included: they tell of classes, too."""
    paths = [entry.path for entry in archive.entries]
    readable = set(paths)
    reasons = {file.path: file.reason for file in archive.refused if file.path not in readable}
    labels = layout.labels_file([*paths, *filter(layout.is_sidecar, reasons)])
    paths = [*paths, *reasons]
    if labels in reasons:  # without it, the folders would be taken for classes
        raise DatasetRefused(f"{labels} cannot be used. {reasons[labels]}")
    if labels is not None:
        _, data = next(archive.read({labels}))
        if isinstance(data, Refused):
            raise DatasetRefused(f"{labels} cannot be used: it is {data.reason}.")
        return layout.from_labels(data, labels, paths, code_page)
    try:
        found = layout.from_folders(paths)
    except LayoutUnknown as error:
        named = _format_named(archive)
        raise LayoutUnknown(f"{error.detail} {named}") if named else error from None
    if len({label for sample in found.samples for label in sample.labels}) > 1:
        return found
    named = _format_named(archive)
    return replace(found, warnings=(*found.warnings, named)) if named else found


def _format_named(archive: Archive) -> str | None:
    """Return what is known of annotations in the archive that are not read; None if there are none."""
    sidecars = [
        entry.path for entry in archive.entries if layout.is_sidecar(entry.path) and entry.size_bytes <= _NAMED_BYTES
    ]
    few = sorted(sidecars, key=lambda path: path.count("/"))[:_NAMED_FILES]
    for path, data in archive.read(set(few)):
        named = layout.name_format(path, data) if isinstance(data, bytes) else None
        if named is not None:
            return named
    return None


def _limit_cpu(seconds: int) -> None:
    """Let the kernel kill this process if it uses more than `seconds` of processor time from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds + 1, resource.RLIM_INFINITY))
