from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from artifacts.store import StoreAddress
from ops.write_settings_docs import TARGET, settings_document
from settings import Settings

OPERATORS = {
    "DATABASE_URL": "postgresql://operator@127.0.0.1:1/precious",
    "REDIS_URL": "redis://127.0.0.1:1",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
    "ESPALIER_VAR": "/precious",
    "ESPALIER_API_KEY": "correct horse battery staple",
    "AWS_ACCESS_KEY_ID": "a-key-of-the-operator",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-operator",
}


def test_every_setting_is_documented_as_it_is() -> None:
    """After a change of the settings, run python -m ops.write_settings_docs."""
    assert TARGET.read_text() == settings_document()
    assert all(field.description for field in Settings.model_fields.values())


def test_nothing_of_an_operator_reaches_a_test() -> None:
    assert not OPERATORS.keys() & os.environ.keys()
    assert not [name for name in os.environ if name.startswith(("ESPALIER_", "AWS_"))]


def test_nothing_that_an_operator_exported_reaches_a_test() -> None:
    this = f"{__file__}::test_nothing_of_an_operator_reaches_a_test"
    command = [sys.executable, "-m", "pytest", "-q", this]
    inner = subprocess.run(command, env=os.environ | OPERATORS, cwd=Path(__file__).parent.parent, capture_output=True)
    assert inner.returncode == 0, inner.stdout.decode()


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OPERATORS, "ESPALIER_API_HOST", "ESPALIER_API_PORT", "ESPALIER_ALLOWED_HOSTS"):
        monkeypatch.setenv(name, "")
    found = Settings()
    assert found == Settings(api_host="127.0.0.1")
    assert (found.redis_url, found.api_key, found.api_port) == (None, None, 8000)
    assert found.database.startswith("sqlite:///") and found.mlflow == "http://127.0.0.1:5000"


@pytest.mark.parametrize("key", ["", " ", "\n"])
def test_a_key_that_is_blank_opens_nothing(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("ESPALIER_API_HOST", "0.0.0.0")
    monkeypatch.setenv("ESPALIER_API_KEY", key)
    with pytest.raises(ValidationError, match="ESPALIER_API_KEY"):
        Settings()


def test_a_key_may_end_in_the_newline_of_its_file() -> None:
    key = Settings(api_key="correct horse battery staple\n").api_key
    assert key is not None and key.get_secret_value() == "correct horse battery staple"


@pytest.mark.parametrize("key", ["short", "0123456789abcde", "schlüssel-schlüssel", "a\tkey with a tab in it"])
def test_a_key_that_can_be_guessed_or_not_be_sent_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match="openssl rand") as told:
        Settings(api_key=key)
    assert key not in str(told.value)


def test_no_representation_shows_the_password_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = {"DATABASE_URL": "postgresql://me:s3cret@db/x", "REDIS_URL": "redis://:s3cret@valkey:6379/0"}
    secret |= {
        "MLFLOW_TRACKING_URI": "http://me:s3cret@mlflow:5000",
        "ESPALIER_WEIGHTS_URL": "https://me:s3cret@mirror",
    }
    for name, value in secret.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.database == secret["DATABASE_URL"]
    assert "s3cret" not in repr(settings) + str(settings) and repr(settings).count("***") == 4


def test_what_is_wrong_is_told_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_API_KEY", OPERATORS["ESPALIER_API_KEY"])
    for wrong in ({"api_port": 99_999}, {"let_go_s": 1}):
        with pytest.raises(ValidationError) as told:
            Settings(**wrong)
        assert OPERATORS["ESPALIER_API_KEY"] not in str(told.value)


def test_stored_files_stay_in_the_data_folder_unless_there_is_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(var="/data").store == StoreAddress("/data/store", None, None, "us-east-1", 50 * 1024**3)
    monkeypatch.setenv("ESPALIER_STORE_URL", "s3://bucket/prefix")
    monkeypatch.setenv("ESPALIER_STORE_ENDPOINT", "https://s3.example.org")
    monkeypatch.setenv("ESPALIER_STORE_REGION", "eu-central-1")
    monkeypatch.setenv("ESPALIER_STORE_CACHE_BYTES", "1000")
    found = Settings(var="/data").store
    assert found == StoreAddress("/data/cache", "s3://bucket/prefix", "https://s3.example.org", "eu-central-1", 1000)


def test_the_keys_of_a_bucket_are_no_settings_and_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OPERATORS.items():
        monkeypatch.setenv(name, value)
    shown = repr(Settings()) + str(Settings().model_dump()) + repr(Settings(store_url="s3://bucket").store)
    assert OPERATORS["AWS_ACCESS_KEY_ID"] not in shown and OPERATORS["AWS_SECRET_ACCESS_KEY"] not in shown


@pytest.mark.parametrize("url", ["bucket", "https://bucket.example.org", "s3://", "s3://Upper"])
def test_what_is_no_address_of_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="Expected a bucket as s3://name"):
        Settings(store_url=url)


def test_the_memory_of_decoders_must_suffice_for_the_largest_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_IMAGE_PIXELS", "100000000")
    with pytest.raises(ValidationError, match=r"ESPALIER_DECODE_BYTES of at least 26 bytes .* 2600000000"):
        Settings()
    monkeypatch.setenv("ESPALIER_DECODE_BYTES", "2600000000")
    assert Settings().image_limits.memory_bytes == 2_600_000_000


def test_only_formats_that_are_decoded_safely_may_be_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_IMAGE_FORMATS", "jpeg, Tiff")
    assert Settings().image_limits.formats == ("JPEG", "TIFF")
    for formats in ("EPS", "JPEG,PDF", "SVG", "JPEG2000", ","):
        monkeypatch.setenv("ESPALIER_IMAGE_FORMATS", formats)
        with pytest.raises(ValidationError, match="image_formats"):
            Settings()


@pytest.mark.parametrize("has_affinity", [True, False])
def test_a_given_number_of_threads_wins_over_the_number_of_processors(
    monkeypatch: pytest.MonkeyPatch, has_affinity: bool
) -> None:
    if not has_affinity:
        monkeypatch.delattr(os, "sched_getaffinity")
    assert Settings().engine_threads >= 1
    monkeypatch.setenv("ESPALIER_THREADS", "77")
    assert Settings().engine_threads == 77


def test_links_to_mlflow_have_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3/cr@et@ml:5000/")
    assert (Settings().mlflow_public, Settings().mlflow) == ("http://ml:5000", "http://me:s3/cr@et@ml:5000/")
