"""All settings, each with its unit, default and reason.

Each process reads its settings at the start and passes plain values to the rooms below. The environment variables have
the prefix ESPALIER_, except DATABASE_URL, REDIS_URL and MLFLOW_TRACKING_URI, which other programs use, too.
`docs/settings.md` is generated from this file; a test compares the two.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from artifacts.addresses import hide_password
from artifacts.archive import ArchiveLimits
from artifacts.bucket_store import parse_url
from artifacts.images import MOST_BYTES_PER_PIXEL, ImageLimits
from artifacts.store import StoreAddress

GIB = 1024**3
MIB = 1024**2
ImageFormat = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]
QueueName = Literal["ingest", "cpu", "gpu", "tracking"]
_KEY_CHARACTERS = 16
_MAKE_KEY = "'openssl rand -hex 32' prints a good one."
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DATABASES = ("postgresql", "sqlite")
_BROKERS = ("redis", "rediss", "redis+socket")


def variable_name(field: str) -> str:
    """Return the environment variable of a field of `Settings`. Some fields have an alias, which is the variable."""
    alias = Settings.model_fields[field].validation_alias if field in Settings.model_fields else field
    if alias is None:
        return f"ESPALIER_{field.upper()}"
    return str(alias.choices[0] if isinstance(alias, AliasChoices) else alias)


def sqlite_url(path: Path) -> str:
    """Return the address of an SQLite file, in which SQLAlchemy reads no character of the path as anything else."""
    return f"sqlite:///{quote(str(path), safe='/ ')}"


class Settings(BaseSettings):
    """The settings of one process, read from environment variables."""

    model_config = SettingsConfigDict(
        env_prefix="ESPALIER_",
        # An empty variable counts as not set: `ESPALIER_API_KEY=$(cat missing)`, `REDIS_URL=`.
        env_ignore_empty=True,
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    var: Path = Path("var")
    """Folder for all data: database, stored files, logs."""
    database_url: Annotated[str | None, Field(validation_alias=AliasChoices("DATABASE_URL"))] = None
    """PostgreSQL or SQLite address; by default an SQLite file in the data folder."""
    redis_url: Annotated[str | None, Field(validation_alias=AliasChoices("REDIS_URL"))] = None
    """Redis or Valkey address; without it `make up` starts a private Valkey."""
    mlflow_url: Annotated[str | None, Field(validation_alias=AliasChoices("MLFLOW_TRACKING_URI"))] = None
    """Address of the MLflow server to which workers log runs; by default this machine at ESPALIER_MLFLOW_PORT."""
    mlflow_public_url: str | None = None
    """Address of MLflow in links that users open in a browser; by default MLFLOW_TRACKING_URI."""
    api_host: str = "127.0.0.1"
    """Address on which the API listens; any address but loopback requires ESPALIER_API_KEY."""
    api_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port of the API."""
    api_public_url: str | None = None
    """Address of the API in the links that MLflow shows; by default loopback with the API's port."""
    mlflow_port: Annotated[int, Field(ge=1, le=65535)] = 5000
    """TCP port of the MLflow server that `make up` starts."""
    api_key: SecretStr | None = None
    """Key of at least 16 ASCII characters that every request must send as `Authorization: Bearer …`; without one, the
    API listens only on loopback."""
    trusted_proxies: str = "127.0.0.1,::1"
    """Addresses and networks of proxies, separated by commas, whose `X-Forwarded-Proto` and `X-Forwarded-For` count."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Host headers that the API accepts, separated by commas; by default loopback names, or any if a key is set."""

    connections: Annotated[int, Field(ge=16, le=100_000)] = 1000
    """Maximum open connections of one API process, at most (`ulimit -n` − 128) / 2; then the longest idle is closed."""
    head_s: Annotated[float, Field(gt=0)] = 20.0
    """Seconds for all headers of a request to arrive; several round trips of the slowest network."""
    body_stall_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds in which 4 KiB of a request's body must arrive, or some of an answer be read; as in common proxies."""

    queues: Annotated[tuple[QueueName, ...], NoDecode] = ("ingest", "cpu", "tracking")
    """Queues for which `make up` starts workers, separated by commas; also those of a worker without `--queues`."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of workers that `make up` starts for each training queue; several train folds of a run in parallel."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Number of threads that compute one network; 0 is one per processor. It affects the last digits of a score."""
    look_every_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between two sweeps of a worker; a lost message delays its job by at most this time."""
    renew_every_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two lease renewals of a running job."""
    lease_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a lease renewal after which another worker takes over the job; several renewal intervals."""
    let_go_s: Annotated[float, Field(gt=0)] = 45.0
    """Seconds without a successful lease renewal after which a worker stops its own job; less than ESPALIER_LEASE_S."""
    cancel_every_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between two checks of a running job for a request to cancel it."""
    stall_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without progress after which a child process counts as hung and is killed."""
    checkpoint_share: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Fraction of the training time that writing checkpoints may take; 1 writes a checkpoint after every epoch."""
    mlflow_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """Timeout in seconds of one call to MLflow; training never waits for it."""

    store_url: str | None = None
    """Bucket for stored files, `s3://bucket/prefix`, with keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""
    store_endpoint: str | None = None
    """Address of an S3-compatible server, such as `https://s3.example.org`; by default AWS in the region."""
    store_region: str = "us-east-1"
    """Region of the bucket; most self-hosted servers accept any region."""
    store_cache_bytes: Annotated[int, Field(gt=0)] = 50 * GIB
    """Maximum bytes of local copies of files in the bucket; above it, the least recently used copies are deleted."""
    collect_every_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds between two garbage collections, which delete unreferenced files; only one worker at a time collects."""
    collect_after_s: Annotated[float, Field(gt=0)] = 86_400.0
    """Minimum age in seconds of an unreferenced file to be deleted; jobs reference a file only after storing it."""

    weights_url: str = "https://storage.googleapis.com/tensorflow/keras-applications"
    """Address under which Keras publishes its pretrained weights, or the address of a mirror."""
    weights_connect_s: Annotated[float, Field(gt=0)] = 5.0
    """Connection timeout in seconds for downloads of weights; short, so that a missing network is reported soon."""
    weights_stall_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without data after which a download of weights fails."""
    weights_cache: Path = Path("~/.keras/models")
    """Folder where Keras keeps its downloads; a weights file there with the right MD5 is not downloaded again."""

    archive_bytes: Annotated[int, Field(gt=0)] = 2 * GIB
    """Maximum bytes of an uploaded archive."""
    archive_entries: Annotated[int, Field(gt=0)] = 200_000
    """Maximum number of files in an archive."""
    archive_inflated_bytes: Annotated[int, Field(gt=0)] = 20 * GIB
    """Maximum total bytes of an archive's files when unpacked."""
    classes: Annotated[int, Field(ge=2)] = 1000
    """Maximum number of classes of a data set."""
    refused_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of files, from 0 to 1, that may be refused; above it, or without a whole class, a version is rejected."""
    image_bytes: Annotated[int, Field(gt=0)] = 20 * MIB
    """Maximum bytes of an image file, in an archive and in a prediction."""
    image_pixels: Annotated[int, Field(gt=0)] = 40_000_000
    """Maximum pixels of an image: 40 megapixels take up to 1 GB while they are decoded."""
    image_side: Annotated[int, Field(gt=0)] = 16_384
    """Maximum pixels of an image's longer side."""
    image_formats: Annotated[tuple[ImageFormat, ...], NoDecode, Field(min_length=1)] = (
        "JPEG",
        "PNG",
        "WEBP",
        "BMP",
        "GIF",
        "TIFF",
        "AVIF",
    )
    """Accepted image formats, separated by commas; decoders of other formats are too vulnerable."""
    decode_bytes: Annotated[int, Field(gt=0)] = GIB
    """Memory for all images that one process decodes at a time; others wait; at least 26 bytes per allowed pixel."""
    decode_cpu_s: Annotated[int, Field(gt=0)] = 10
    """Maximum seconds of processor time for decoding one image during ingest."""
    ingest_memory_bytes: Annotated[int, Field(gt=0)] = 3 * GIB // 2
    """Memory limit in bytes of the process that decodes images during ingest."""
    free_disk_bytes: Annotated[int, Field(ge=0)] = 2 * GIB
    """Bytes of disk space that must stay free; an upload that would leave less is refused."""
    predict_images: Annotated[int, Field(gt=0)] = 32
    """Maximum number of images in a prediction request."""
    predict_bytes: Annotated[int, Field(gt=0)] = 64 * MIB
    """Maximum bytes of the body of a prediction request."""
    predict_waiting: Annotated[int, Field(gt=0)] = 64
    """Maximum number of images waiting in one API process; predictions beyond it are refused as overload."""
    predict_deadline_s: Annotated[float, Field(gt=0, le=30)] = 5.0
    """Seconds from the first byte of a prediction request to its answer, loading the model included."""
    engine: Literal["auto", "openvino", "onnxruntime"] = "auto"
    """Engine that computes predictions; `auto` chooses ONNX Runtime if it finds a GPU with CUDA, else OpenVINO."""
    shelf_bytes: Annotated[int, Field(gt=0)] = 4 * GIB
    """Maximum bytes of memory for loaded networks; above it, the least recently used networks are unloaded."""

    pixels_bytes: Annotated[int, Field(gt=0)] = 50 * GIB
    """Maximum bytes on disk of decoded images for fine-tuning; above it, the least recently used are deleted."""

    @field_validator("allowed_hosts", "queues", "image_formats", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).scheme.partition("+")[0] not in _DATABASES:
            raise ValueError(
                "Expected an address such as postgresql://user@host:5432/database or sqlite:////folder/file.db. "
                f"Received {hide_password(value)!r}."
            )
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).scheme not in _BROKERS:
            raise ValueError(
                "Expected an address such as redis://host:6379/0, rediss://… or redis+socket:///folder/valkey.sock. "
                f"Received {hide_password(value)!r}."
            )
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, value: str) -> str:
        """Check what uvicorn would silently never match: names, and networks with bits beyond their prefix."""
        for part in (part.strip() for part in value.split(",")):
            try:
                if part != "*":
                    ipaddress.ip_network(part)
            except ValueError as error:
                raise ValueError(
                    f"Expected IP addresses and networks such as 172.16.0.0/12, separated by commas. Received {part!r}."
                ) from error
        return value

    @field_validator("store_url")
    @classmethod
    def _check_store_url(cls, value: str | None) -> str | None:
        if value is not None:
            parse_url(value)
        return value

    @field_validator("image_formats", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Yield the settings for a representation, in which no address shows its password."""
        for name, value in super().__repr_args__():
            yield name, hide_password(value) if isinstance(value, str) else value

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, value: SecretStr | None) -> SecretStr | None:
        """Strip the whitespace around a key that was read from a file, since a header cannot contain it.

        Raises ValueError for a key that a header cannot contain or that can be guessed.
        """
        if value is None:
            return None
        key = value.get_secret_value().strip()
        if not key:
            raise ValueError("ESPALIER_API_KEY contains only spaces. Set it to a key, or unset it to use no key.")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                "ESPALIER_API_KEY must contain only printable ASCII characters, since HTTP headers are sent in ASCII. "
                f"{_MAKE_KEY}"
            )
        if len(key) < _KEY_CHARACTERS:
            raise ValueError(
                f"ESPALIER_API_KEY has {len(key)} characters, which are too easy to guess. It must have at "
                f"least {_KEY_CHARACTERS}. {_MAKE_KEY}"
            )
        return SecretStr(key)

    @model_validator(mode="after")
    def _refuse_open_doors(self) -> Settings:
        if self.api_host not in _LOOPBACK and self.api_key is None:
            raise ValueError(
                f"ESPALIER_API_HOST={self.api_host} would give everyone on the network access. "
                "Set ESPALIER_API_KEY too, or leave the host at 127.0.0.1."
            )
        if self.decode_bytes < MOST_BYTES_PER_PIXEL * self.image_pixels:
            raise ValueError(
                f"Expected ESPALIER_DECODE_BYTES of at least {MOST_BYTES_PER_PIXEL} bytes for each of "
                f"ESPALIER_IMAGE_PIXELS, {MOST_BYTES_PER_PIXEL * self.image_pixels}, so that the largest image can be "
                f"decoded. Received {self.decode_bytes}."
            )
        if not self.renew_every_s < self.let_go_s < self.lease_s:
            raise ValueError(
                "ESPALIER_RENEW_EVERY_S must be less than ESPALIER_LET_GO_S, and ESPALIER_LET_GO_S less than "
                "ESPALIER_LEASE_S."
            )
        return self

    @property
    def live_s(self) -> float:
        """Maximum seconds since a worker was last seen for it to count as live and to get jobs: three sweeps."""
        return 3 * self.look_every_s

    @cached_property
    def database(self) -> str:
        """The database address, by default an SQLite file in the data folder."""
        return self.database_url or sqlite_url(self.var.absolute() / "espalier.db")

    @cached_property
    def mlflow(self) -> str:
        """The MLflow address that workers use."""
        return self.mlflow_url or f"http://127.0.0.1:{self.mlflow_port}"

    @cached_property
    def mlflow_public(self) -> str:
        """The MLflow address for links that users open, without the user and password of the one for workers."""
        return (self.mlflow_public_url or _without_user(self.mlflow)).rstrip("/")

    @cached_property
    def api_public(self) -> str:
        """The API address for links that users open."""
        return (self.api_public_url or f"http://127.0.0.1:{self.api_port}").rstrip("/")

    @cached_property
    def hosts(self) -> tuple[str, ...]:
        """The accepted Host names; `*` accepts any."""
        return self.allowed_hosts or (("*",) if self.api_key else ("127.0.0.1", "localhost", "[::1]"))

    @cached_property
    def store(self) -> StoreAddress:
        """Where files are stored: in a bucket, or without one in a folder.

        Local copies of a bucket's files are kept in another folder than files that exist only on this machine.
        """
        return StoreAddress(
            folder=str((self.var / ("store" if self.store_url is None else "cache")).absolute()),
            url=self.store_url,
            endpoint=self.store_endpoint,
            region=self.store_region,
            cache_bytes=self.store_cache_bytes,
        )

    @cached_property
    def features_folder(self) -> Path:
        """Folder in which features of images are cached."""
        return self.var / "features"

    @cached_property
    def pixels_folder(self) -> Path:
        """Folder in which decoded images are cached for fine-tuning."""
        return self.var / "pixels"

    @cached_property
    def engine_threads(self) -> int:
        """Number of threads that compute one network; at least 1."""
        if self.threads:
            return self.threads
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @cached_property
    def archive_limits(self) -> ArchiveLimits:
        """The settings that limit an uploaded archive, as one value."""
        return ArchiveLimits(entries=self.archive_entries, inflated_bytes=self.archive_inflated_bytes)

    @cached_property
    def image_limits(self) -> ImageLimits:
        """The settings that limit an image, as one value."""
        return ImageLimits(
            self.image_bytes, self.image_pixels, self.image_side, self.image_formats, memory_bytes=self.decode_bytes
        )


def _without_user(url: str) -> str:
    """Return an address without user and password."""
    return re.sub(r"(?<=://)[^\s]*@", "", url)
