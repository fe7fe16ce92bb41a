"""HTTP answers whose content is a stored file: the whole file, a part of it, or that the client has it already."""

from __future__ import annotations

from typing import Any

from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from artifacts.store import Digest, Store
from errors import RangeUnsatisfiable, RequestMalformed


def file_answers(media_type: str, description: str = "The file.") -> dict[int | str, dict[str, Any]]:
    """Return the documentation of the answers of a route that sends a stored file."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {
        200: {"description": description, "content": content},
        206: {"description": "The part of the file that the header `Range` names.", "content": {"*/*": {}}},
        304: {"description": "The client has the file: the header `If-None-Match` has its `ETag`. No body."},
    }


class StoredFile(FileResponse):
    """A file, or the part of it that the header `Range` names.

    Raises RequestMalformed for a `Range` that cannot be read, and RangeUnsatisfiable for one beyond the end of the
    file. The framework would answer both in plain text.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unless_refused(message: Message) -> None:
            status = message.get("status")
            if status == 400:
                raise RequestMalformed(
                    "Range: Expected bytes=FIRST-LAST, bytes=FIRST- or bytes=-LENGTH. Received something else. Without "
                    "the header, the whole file is sent."
                )
            if status == 416:
                size_bytes = int(self.headers["content-length"])
                raise RangeUnsatisfiable(
                    f"Range: Expected a first byte before the end of the file, which has {size_bytes} bytes. Received "
                    "one beyond it.",
                    size_bytes=size_bytes,
                )
            await send(message)

        await super().__call__(scope, receive, send_unless_refused)


def stored_file(store: Store, sha256: str, media_type: str) -> StoredFile:
    """Return an HTTP answer with the content of a stored file. Its ETag is the file's digest.

    Raises NotFound if the store does not have the file, Corrupt if its content does not match the digest.
    """
    path = store.verified_path(Digest(sha256))
    return StoredFile(path, media_type=media_type, headers={"ETag": f'"{sha256}"'})
