from __future__ import annotations

import pytest

from artifacts.addresses import hide_password


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:s3cret@db:5432/x", "postgresql://me:***@db:5432/x"),
        ("postgresql://me:s3/cr@et@db/x", "postgresql://me:***@db/x"),
        ("redis://:s3cret@valkey:6379/0", "redis://:***@valkey:6379/0"),
        ("http://me:s3@cret@mlflow:5000: refused", "http://me:***@mlflow:5000: refused"),
        (
            "postgresql://db/x?user=me&password=s3cret&sslmode=require",
            "postgresql://db/x?user=me&password=***&sslmode=require",
        ),
        ("http://mlflow:5000/path and me@example.org", "http://mlflow:5000/path and me@example.org"),
    ],
)
def test_a_text_shows_its_addresses_without_their_passwords(text: str, shown: str) -> None:
    assert hide_password(text) == shown
