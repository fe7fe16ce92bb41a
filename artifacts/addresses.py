"""Hides the passwords in addresses that are shown or logged."""

from __future__ import annotations

import re

# The password before an @, or the value of a parameter whose name says that it is secret.
_PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):[^\s]*(?=@)|(?<=[?&;])(password|passwd|token|sslpassword)=[^&\s]*", re.I)


def hide_password(text: str) -> str:
    """Return a text with the password of each address in it replaced by `***`."""
    return _PASSWORD.sub(lambda found: f"{found[1]}:***" if found[2] is None else f"{found[2]}=***", text)
