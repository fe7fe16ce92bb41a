"""HTTP answers whose content is a stored file."""

from __future__ import annotations

from fastapi.responses import FileResponse

from artifacts.store import Digest, Store


def stored_file(store: Store, sha256: str, media_type: str) -> FileResponse:
    """Return an HTTP answer with the content of a stored file. Its ETag is the file's digest.

    Raises NotFound if the store does not have the file, Corrupt if its content does not match the digest.
    """
    path = store.verified_path(Digest(sha256))
    return FileResponse(path, media_type=media_type, headers={"ETag": f'"{sha256}"'})
