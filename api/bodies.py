"""Reads request bodies: streams archives into the store and images into memory. Decodes neither."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json
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
from errors import ArchiveRefused, DiskFull, EspalierError, ImageRefused, RequestInvalid, TooLarge

MIB = 1024 * 1024
JSON_BYTES = MIB
# Values of a JSON body: a comparison of 20 recipes with 200 layers each has fewer. Pydantic keeps one error for each.
JSON_VALUES = 20_000
# Multipart fields beside those that a route reads.
OTHER_FIELDS = 100
_NAMES_SHOWN = 3
_CHUNK_BYTES = MIB
# Bytes of a multipart body beside the archive: other fields, headers and boundaries.
_AROUND_ARCHIVE_BYTES = MIB
# How JSON begins, and no image.
_JSON_STARTS = (b"{", b"[", b'"')
_DATA_URL = b"data:"
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
        async for piece in _archive_bytes(request, limit_bytes):
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


async def _archive_bytes(request: Request, limit_bytes: int) -> AsyncIterator[bytes]:
    """Yield the bytes of the archive. Raises TooLarge if what surrounds it makes the body far larger than the limit."""
    boundary = _boundary(request)
    pieces = _in_large_chunks(request.stream())
    if boundary is None:
        async for piece in pieces:
            yield piece
        return
    form = _MultipartForm(boundary, "archive", limit=1)
    received = 0
    async for piece in pieces:
        received += len(piece)
        if received > limit_bytes + _AROUND_ARCHIVE_BYTES:
            raise TooLarge(
                f"The multipart body has {received / MIB:,.1f} MiB or more; the limit is {limit_bytes / MIB:,.0f} MiB "
                f"for the archive and {_AROUND_ARCHIVE_BYTES / MIB:g} MiB for all else. Send only the field 'archive'."
            )
        yield b"".join(data for _, data in await asyncio.to_thread(form.feed, piece))
    if not form.parts:
        raise RequestInvalid(
            f"Expected a multipart field 'archive'. Received {_names(form.other_names)}. Send it as in "
            "curl -F archive=@images.zip.",
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


async def receive_images(request: Request, limit_images: int, limit_bytes: int, limit_file_bytes: int) -> list[bytes]:
    """Return the image files of a prediction request, not decoded.

    The body is one image file, a form with multipart fields `images`, or JSON with base64 text.

    Raises:
        TooLarge: the body, the number of images or one image exceeds its limit.
        ImageRefused: a file is empty, or a data URL. The error's field `image` is the index of the file, from 0.
        RequestInvalid: the request contains no image, or its body is malformed.
    """
    boundary = _boundary(request)
    if boundary is not None:
        images = await _multipart_images(request, boundary, limit_images, limit_bytes)
    else:
        body = await _whole_body(request, limit_bytes)
        if body[:_SNIFFED_BYTES].lstrip().startswith(_JSON_STARTS):
            images = await asyncio.to_thread(_json_images, body, limit_images)
        else:
            images = [body] if body else []
    if not images:
        raise RequestInvalid(
            "Expected an image as the body, multipart fields 'images', or JSON {'images': [base64]}. Received nothing.",
            field="images",
        )
    for position, image in enumerate(images):
        _check_file(position, image, limit_file_bytes)
    return images


async def _whole_body(request: Request, limit_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in _limited_stream(request, limit_bytes):
        body += chunk
    return bytes(body)


async def _limited_stream(request: Request, limit_bytes: int) -> AsyncIterator[bytes]:
    """Yield the body of a prediction request. Raises TooLarge as soon as it exceeds the limit."""
    limit = f"; the limit is {limit_bytes / MIB:g} MiB. Send fewer images in one request."
    announced = declared_bytes(request) or 0
    if announced > limit_bytes:
        raise TooLarge(f"The body has {announced} bytes{limit}")
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit_bytes:
            raise TooLarge(f"The body has more than {limit_bytes} bytes{limit}")
        yield chunk


def _check_file(position: int, image: bytes, limit_bytes: int) -> None:
    if not image:
        raise ImageRefused(f"Image {position + 1} is an empty file.", image=position)
    if image.startswith(_DATA_URL):
        raise ImageRefused(
            f"Image {position + 1}: Expected the bytes of an image file. Received a data URL. Send the bytes that it "
            'stands for, or JSON {"images": [base64]} with what follows the comma of the URL.',
            image=position,
        )
    if len(image) > limit_bytes:
        raise TooLarge(
            f"Image {position + 1} has {len(image) / MIB:.1f} MiB; the limit for a file is {limit_bytes / MIB:g} MiB.",
            image=position,
        )


async def _multipart_images(request: Request, boundary: bytes, limit_images: int, limit_bytes: int) -> list[bytes]:
    form = _MultipartForm(boundary, "images", limit_images)
    images: dict[int, bytearray] = {}
    async for piece in _in_large_chunks(_limited_stream(request, limit_bytes)):
        for part, data in await asyncio.to_thread(form.feed, piece):
            images.setdefault(part, bytearray()).extend(data)
    if not images and form.other_names:
        raise RequestInvalid(
            f"Expected multipart fields 'images'. Received {_names(form.other_names)}. Rename the field, as in "
            "curl -F images=@photo.jpg.",
            field="images",
        )
    return [bytes(image) for image in images.values()]


def _too_many_images(limit_images: int) -> TooLarge:
    return TooLarge(
        f"The request has more than {limit_images:,} images, which is the limit. Send them in several requests, or "
        "raise ESPALIER_PREDICT_IMAGES."
    )


def _json_images(body: bytes, limit_images: int) -> list[bytes]:
    """Return the images of a JSON body.

    Base64 has no commas. So a body with more commas than the limit of images is parsed only as far as the limit.
    Raises RequestInvalid for the first error, and TooLarge.
    """
    end = _nth_comma(body, limit_images + 1)
    try:
        if end is None:
            images = list(PredictRequest.model_validate_json(body).images)
        else:
            images = list(PredictRequest.model_validate(from_json(body[:end], allow_partial=True)).images)
    except ValidationError as error:
        raise _images_invalid(error.errors()[0]) from error
    except ValueError as error:  # of `from_json`
        raise RequestInvalid(f"body: Expected JSON. Received something else: {error}.", field="body") from error
    if end is not None or len(images) > limit_images:
        raise _too_many_images(limit_images)
    return images


def _nth_comma(body: bytes, number: int) -> int | None:
    """Return the position of the comma with this number, counted from 1; None if there are fewer."""
    at = -1
    for _ in range(number):
        at = body.find(b",", at + 1)
        if at < 0:
            return None
    return at


def _images_invalid(error: ErrorDetails) -> RequestInvalid:
    """Return the error for the first thing that is wrong with a JSON body of images."""
    field = problems.field_path(error["loc"]) or "body"
    expected, received = problems.expected_and_received(error)
    hint = ""
    if error["type"] == "extra_forbidden":
        expected = "Expected only the field 'images', a list of base64 texts"
    elif error["type"] == "missing":
        expected, received = "Expected a list of base64 texts", _names(list(error["input"])[:_NAMES_SHOWN])
    elif error["loc"] == ("images",) and isinstance(error["input"], str):
        hint = " Send a list for a single image too."
    elif error["loc"][:1] == ("images",) and len(error["loc"]) == 2:
        expected = "Expected the bytes of an image file as base64 text"
        if isinstance(error["input"], str) and error["input"].startswith("data:"):
            hint = " Send only what follows the comma of a data URL."
        else:
            hint = " In Python: base64.b64encode(image_bytes).decode()."
    return RequestInvalid(f"{field}: {expected}. Received {received}.{hint}", field=field)


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
                raise TooLarge(_json_too_large(f"{announced} bytes"))
            MutableHeaders(scope=request.scope)["content-type"] = "application/json"
            try:
                return await handler(Request(request.scope, _limited(request.receive)))
            except _BodyTooLarge as error:
                raise TooLarge(error.detail) from error
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
    """The body exceeds a limit, which `detail` names.

    An HTTPException, because FastAPI wraps other errors that are raised while it reads.
    """


def _limited(receive: Receive) -> Receive:
    """Return a function that receives a JSON body. It raises _BodyTooLarge beyond the limits of bytes and values.

    Values are counted by the commas between them. Commas inside texts count too, but a body has few of them.
    """
    left, values_left = JSON_BYTES, JSON_VALUES

    async def counted() -> Message:
        nonlocal left, values_left
        message = await receive()
        body = message.get("body", b"")
        left -= len(body)
        values_left -= body.count(b",")
        if left < 0:
            raise _BodyTooLarge(413, _json_too_large(f"more than {JSON_BYTES} bytes"))
        if values_left <= 0:
            raise _BodyTooLarge(
                413, f"The body has more than {JSON_VALUES:,} JSON values, which is the limit. Send less at a time."
            )
        return message

    return counted


def _json_too_large(received: str) -> str:
    return f"The body has {received}; the limit is {JSON_BYTES / MIB:g} MiB."


# --- multipart -----------------------------------------------------------------------------------------------------


def _boundary(request: Request) -> bytes | None:
    """Return the boundary of a multipart body, or None for any other body. Raises RequestInvalid without a boundary."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        return None
    boundary = options.get(b"boundary")
    if not boundary:
        raise RequestInvalid(
            "Expected a boundary in the Content-Type multipart/form-data. Received none. HTTP clients add it if they "
            "build the form and the header."
        )
    return boundary


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"a field {problems.short_repr(name)}" for name in names) or "none"


class _MultipartForm:
    """Parses a multipart body piece by piece, without keeping its content in memory, and stops at its limits.

    Attributes:
        parts: how many fields of the wanted name have begun.
        other_names: the names of the first other fields.
    """

    def __init__(self, boundary: bytes, wanted: str, limit: int) -> None:
        """Accept at most `limit` fields named `wanted`, and `OTHER_FIELDS` others."""
        self.parts = 0
        self.other_names: list[str] = []
        self._wanted = wanted
        self._limit = limit
        self._others = 0
        self._is_wanted = False
        self._header = self._value = b""
        self._out: list[tuple[int, bytes]] = []
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_field,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
            },
        )

    def feed(self, chunk: bytes) -> list[tuple[int, bytes]]:
        """Parse the next chunk of the body.

        Returns (number of the wanted field, bytes) for each piece of a wanted field in this chunk. A field that begins
        in this chunk also has a piece without bytes.

        Raises:
            RequestInvalid: the body is malformed or has too many fields.
            TooLarge: the body has too many images.
        """
        self._out = []
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise RequestInvalid(f"The multipart body is malformed: {error}.") from error
        return self._out

    def _begin(self) -> None:
        self._name = ""

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._header = self._value = b""

    def _on_headers(self) -> None:
        self._is_wanted = self._name == self._wanted
        if self._is_wanted:
            self.parts += 1
            if self.parts > self._limit:
                raise self._too_many()
            self._out.append((self.parts, b""))  # so that a part without content is not lost
            return
        self._others += 1
        if len(self.other_names) < _NAMES_SHOWN:
            self.other_names.append(self._name)
        if self._others > OTHER_FIELDS:
            raise RequestInvalid(
                f"Expected multipart fields '{self._wanted}' and at most {OTHER_FIELDS} others. Received more, such as "
                f"{_names(self.other_names)}.",
                field=self._wanted,
            )

    def _too_many(self) -> EspalierError:
        if self._limit > 1:
            return _too_many_images(self._limit)
        return RequestInvalid(
            f"Expected one multipart field '{self._wanted}'. Received two. Upload the second archive as another "
            "version of the data set.",
            field=self._wanted,
        )

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_wanted:
            self._out.append((self.parts, data[start:end]))
