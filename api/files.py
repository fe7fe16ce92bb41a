"""Answers that are stored files."""

from __future__ import annotations

from fastapi.responses import FileResponse

from artifacts.store import Digest, Store


def stored_file(store: Store, sha256: str, media_type: str) -> FileResponse:
    """Return a stored file as an answer, with its digest as the ETag.

    Raises NotFound if the store does not have it, Corrupt if its content does not match the digest.
    """
    path = store.verified_path(Digest(sha256))
    return FileResponse(path, media_type=media_type, headers={"ETag": f'"{sha256}"'})
