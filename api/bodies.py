"""Reads request bodies: streams archives into the store and images into memory. Decodes neither."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from api import problems
from api.schemas import PredictRequest
from artifacts.archive import sniff
from artifacts.store import Digest, Store, Writer
from errors import ArchiveRefused, DeadlineExceeded, DiskFull, ImageRefused, RequestInvalid, TooLarge

MIB = 1024 * 1024
JSON_BYTES = MIB
_CHUNK_BYTES = MIB
_SNIFFED_BYTES = 262
_DISK_EVERY_BYTES = 64 * MIB
# Disk space that an upload needs, as a multiple of its size. The archive and its images exist at the same time.
_ROOM = 2.5


def declared_bytes(request: Request) -> int | None:
    """Return the value of the header Content-Length, or None if it is missing or not a number."""
    declared = request.headers.get("content-length", "")
    return int(declared) if re.fullmatch(r"[0-9]{1,18}", declared) else None


# --- archives ------------------------------------------------------------------------------------------------------


async def receive_archive(request: Request, store: Store, limit_bytes: int, free_disk_bytes: int) -> Digest:
    """Stream an uploaded archive into the store and return its digest.

    The archive is the raw body or the multipart field `archive`.

    Raises:
        TooLarge: Content-Length or the body exceeds `limit_bytes`.
        DiskFull: the upload would leave less than `free_disk_bytes` of free disk space.
        ArchiveRefused: the first bytes are not those of a zip, tar or tar.gz archive.
        RequestInvalid: the multipart body is malformed, or does not have exactly one field `archive`.
    """
    announced = declared_bytes(request) or 0
    _check_size(announced, limit_bytes)
    _check_disk(store, int(_ROOM * announced) + free_disk_bytes)
    sink = _ArchiveSink(store, limit_bytes, free_disk_bytes)
    with store.writer() as writer:
        async for piece in _archive_bytes(request):
            await asyncio.to_thread(sink.take, writer, piece)
        sink.check_end()
        return await asyncio.to_thread(writer.commit)


@dataclass
class _ArchiveSink:
    """Writes an archive piece by piece, and checks its format, its size and the free disk space meanwhile."""

    store: Store
    limit_bytes: int
    free_disk_bytes: int
    head: bytes = b""
    since_disk_check: int = 0

    def take(self, writer: Writer, piece: bytes) -> None:
        if len(self.head) < _SNIFFED_BYTES:
            self.head += piece[: _SNIFFED_BYTES - len(self.head)]
            if len(self.head) == _SNIFFED_BYTES:
                self._check_kind()
        _check_size(writer.size_bytes + len(piece), self.limit_bytes)
        self.since_disk_check += len(piece)
        if self.since_disk_check >= _DISK_EVERY_BYTES:
            self.since_disk_check = 0
            _check_disk(self.store, self.free_disk_bytes)
        writer.write(piece)

    def check_end(self) -> None:
        """Check the format of an archive that is so short that `take` has not checked it. Raises ArchiveRefused."""
        if len(self.head) < _SNIFFED_BYTES:
            self._check_kind()

    def _check_kind(self) -> None:
        if sniff(self.head) is None:
            received = "an empty body" if not self.head else f"something that begins with {self.head[:16]!r}"
            raise ArchiveRefused(f"Expected a zip, tar or tar.gz archive. Received {received}.")


def _check_size(size_bytes: int, limit_bytes: int) -> None:
    if size_bytes > limit_bytes:
        raise TooLarge(
            f"The archive has {size_bytes / MIB:,.1f} MiB or more; the limit is {limit_bytes / MIB:,.0f} MiB. Upload "
            "the images in several archives, each as a version of the data set, or raise ESPALIER_ARCHIVE_BYTES."
        )


def _check_disk(store: Store, needed_bytes: int) -> None:
    free = shutil.disk_usage(store.root).free
    if free < needed_bytes:
        raise DiskFull(
            f"This upload and its images need {needed_bytes / MIB:,.0f} MiB of free disk space; the disk has "
            f"{free / MIB:,.0f} MiB. Delete data sets that are not needed, or enlarge the disk."
        )


async def _archive_bytes(request: Request) -> AsyncIterator[bytes]:
    boundary = _boundary(request)
    pieces = _in_large_chunks(request.stream())
    if boundary is None:
        async for piece in pieces:
            yield piece
        return
    form = _MultipartForm(boundary)
    archive: int | None = None
    async for piece in pieces:
        for part, name, data in form.feed(piece):
            if name != "archive":
                continue
            if archive not in (None, part):
                raise RequestInvalid(
                    "Expected one multipart field 'archive'. Received two. Upload the second archive as another "
                    "version of the data set.",
                    field="archive",
                )
            archive = part
            yield data
    if archive is None:
        raise RequestInvalid(
            f"Expected a multipart field 'archive'. Received the fields {sorted(form.names) or 'none'}.",
            field="archive",
        )


async def _in_large_chunks(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the bytes of a stream in pieces of about a mebibyte, so that writing on a thread is worth the switch."""
    buffer = bytearray()
    async for chunk in stream:
        buffer += chunk
        if len(buffer) >= _CHUNK_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


# --- images --------------------------------------------------------------------------------------------------------


async def receive_images(
    request: Request, limit_images: int, limit_bytes: int, limit_file_bytes: int, stall_s: float
) -> list[bytes]:
    """Return the image files of a prediction request, not decoded.

    The body is one image file, a form with multipart fields `images`, or JSON with base64 text.

    Raises:
        TooLarge: the body, the number of images or one image exceeds its limit.
        DeadlineExceeded: no bytes arrived for `stall_s` seconds before the body was complete.
        ImageRefused: a file is empty. The error's field `image` is the index of the file, from 0.
        RequestInvalid: the request contains no image, or its body is malformed.
    """
    boundary = _boundary(request)
    body = await _whole_body(request, limit_bytes, stall_s)
    if boundary is not None:
        images = _multipart_images(body, boundary)
    elif body[:_SNIFFED_BYTES].lstrip().startswith(b"{"):  # no image begins with a brace
        images = _json_images(body)
    else:
        images = [body] if body else []
    if not images:
        raise RequestInvalid(
            "Expected an image as the body, multipart fields 'images', or JSON {'images': [base64]}. Received nothing.",
            field="images",
        )
    if len(images) > limit_images:
        raise TooLarge(
            f"The request has {len(images):,} images; the limit is {limit_images:,}. Send them in several requests, or "
            "raise ESPALIER_PREDICT_IMAGES."
        )
    for position, image in enumerate(images):
        _check_file(position, image, limit_file_bytes)
    return images


async def _whole_body(request: Request, limit_bytes: int, stall_s: float) -> bytes:
    limit = f"; the limit is {limit_bytes / MIB:g} MiB. Send fewer images in one request."
    announced = declared_bytes(request) or 0
    if announced > limit_bytes:
        raise TooLarge(f"The body has {announced} bytes{limit}")
    body = bytearray()
    try:
        async with asyncio.timeout(stall_s) as patience:
            async for chunk in request.stream():
                patience.reschedule(asyncio.get_running_loop().time() + stall_s)
                body += chunk
                if len(body) > limit_bytes:
                    raise TooLarge(f"The body has more than {limit_bytes} bytes{limit}")
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"The body is incomplete: {len(body)} bytes arrived, then nothing for {stall_s:g} s. Send it again."
        ) from error
    return bytes(body)


def _check_file(position: int, image: bytes, limit_bytes: int) -> None:
    if not image:
        raise ImageRefused(f"Image {position + 1} is an empty file.", image=position)
    if len(image) > limit_bytes:
        raise TooLarge(
            f"Image {position + 1} has {len(image) / MIB:.1f} MiB; the limit for a file is {limit_bytes / MIB:g} MiB.",
            image=position,
        )


def _multipart_images(body: bytes, boundary: bytes) -> list[bytes]:
    form = _MultipartForm(boundary)
    images: dict[int, bytearray] = {}
    for part, name, data in form.feed(body):
        if name == "images":
            images.setdefault(part, bytearray()).extend(data)
    return [bytes(image) for image in images.values()]


def _json_images(body: bytes) -> list[bytes]:
    try:
        return list(PredictRequest.model_validate_json(body).images)
    except ValidationError as error:
        first = error.errors()[0]
        field = problems.field_path(first["loc"]) or "body"
        expected, received = problems.expected_and_received(first)
        raise RequestInvalid(f"{field}: {expected}. Received {received}.", field=field) from error


# --- JSON ----------------------------------------------------------------------------------------------------------


class JsonRoute(APIRoute):
    """A route that reads its body as JSON of at most one mebibyte.

    The Content-Type is ignored, because curl declares any body as a form. The size is checked here, because FastAPI
    would answer in plain text and bypass the error handlers.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def limited(request: Request) -> Response:
            announced = declared_bytes(request) or 0
            if announced > JSON_BYTES:
                raise _json_too_large(f"{announced} bytes")
            MutableHeaders(scope=request.scope)["content-type"] = "application/json"
            try:
                return await handler(Request(request.scope, _limited(request.receive, JSON_BYTES)))
            except _BodyTooLarge as error:
                raise _json_too_large(f"more than {JSON_BYTES} bytes") from error
            except HTTPException as error:
                if isinstance(error.__cause__, ClientDisconnect):
                    raise error.__cause__ from None
                if error.status_code != 400:
                    raise
                raise RequestInvalid(
                    "body: Expected JSON in UTF-8, not too deeply nested. Received a body that cannot be parsed.",
                    field="body",
                ) from error

        return limited


class _BodyTooLarge(HTTPException):
    """The body is too large. An HTTPException, because FastAPI wraps other errors that are raised while it reads."""


def _limited(receive: Receive, limit_bytes: int) -> Receive:
    left = limit_bytes

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise _BodyTooLarge(413)
        return message

    return counted


def _json_too_large(received: str) -> TooLarge:
    return TooLarge(f"The body has {received}; the limit is {JSON_BYTES / MIB:g} MiB.")


# --- multipart -----------------------------------------------------------------------------------------------------


def _boundary(request: Request) -> bytes | None:
    """Return the boundary of a multipart body, or None for any other body. Raises RequestInvalid without a boundary."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        return None
    boundary = options.get(b"boundary")
    if not boundary:
        raise RequestInvalid("The Content-Type multipart/form-data has no boundary.")
    return boundary


@dataclass
class _MultipartForm:
    """Parses a multipart body piece by piece, without keeping its content in memory."""

    boundary: bytes
    names: set[str] = field(default_factory=set)
    _part: int = 0
    _name: str = ""
    _header: bytes = b""
    _value: bytes = b""
    _out: list[tuple[int, str, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parser = MultipartParser(
            self.boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_field,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_part_data": self._on_data,
            },
        )

    def feed(self, chunk: bytes) -> list[tuple[int, str, bytes]]:
        """Parse the next chunk of the body.

        Returns (number of the part, name of its field, bytes) for each piece of a part in this chunk. A part that
        begins in this chunk also has a piece without bytes.
        """
        self._out = []
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise RequestInvalid(f"The multipart body is malformed: {error}.") from error
        return self._out

    def _begin(self) -> None:
        self._part += 1
        self._name = ""

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            self.names.add(self._name)
            self._out.append((self._part, self._name, b""))  # so that a part without content is not lost
        self._header = self._value = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._out.append((self._part, self._name, data[start:end]))
