"""All settings, with unit, default and reason. Only processes read them and pass plain values to lower floors.

Variables have the prefix ESPALIER_, except DATABASE_URL, REDIS_URL and MLFLOW_TRACKING_URI, which other programs use,
too. `docs/settings.md` is generated from this file; a test compares the two.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from artifacts.addresses import hide_password
from artifacts.archive import ArchiveLimits
from artifacts.bucket_store import parse_url
from artifacts.images import ImageLimits
from artifacts.store import StoreAddress

GIB = 1024**3
MIB = 1024**2
ImageFormat = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
QueueName = Literal["ingest", "cpu", "gpu", "tracking"]
_KEY_CHARACTERS = 16
_MAKE_KEY = "'openssl rand -hex 32' prints a good one."
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Settings(BaseSettings):
    """The settings of one process, from the environment."""

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
    """MLflow address that workers log runs to; by default this machine at ESPALIER_MLFLOW_PORT."""
    mlflow_public_url: str | None = None
    """MLflow address for links that users open in a browser; by default MLFLOW_TRACKING_URI."""
    api_host: str = "127.0.0.1"
    """Address that the API listens on; anything but loopback needs ESPALIER_API_KEY."""
    api_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port of the API."""
    api_public_url: str | None = None
    """API address for links in MLflow; by default loopback with the API's port."""
    mlflow_port: Annotated[int, Field(ge=1, le=65535)] = 5000
    """TCP port of the MLflow server that `make up` starts."""
    api_key: SecretStr | None = None
    """Key of at least 16 ASCII characters that every request must send as `Authorization: Bearer …`; without it only
    loopback is allowed."""
    trusted_proxies: str = "127.0.0.1,::1"
    """Addresses and networks of proxies, separated by commas, whose `X-Forwarded-Proto` and `X-Forwarded-For` count."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Allowed Host headers, separated by commas; by default loopback names, or any if a key is set."""

    connections: Annotated[int, Field(ge=16, le=100_000)] = 1000
    """Open connections of one API process, or half of `ulimit -n` less 128; beyond it the longest idle are closed."""
    head_s: Annotated[float, Field(gt=0)] = 20.0
    """Seconds for the head of a request to arrive; several round trips of the slowest network."""
    body_stall_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds in which 4 KiB of a request's body must arrive, or some of an answer be read; as in common proxies."""

    queues: Annotated[tuple[QueueName, ...], NoDecode] = ("ingest", "cpu", "tracking")
    """Queues that `make up` starts workers for, separated by commas. A worker without `--queues` serves all of them."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Workers that `make up` starts; several train the folds of a fine-tuning run side by side."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads of one network, 0 for one per available processor; the number affects the last digits of a score."""
    look_every_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between two sweeps of a worker: the most that a lost message costs."""
    renew_every_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two lease renewals of a running job."""
    lease_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without renewal after which another worker takes a job over; several times the renewal interval."""
    let_go_s: Annotated[float, Field(gt=0)] = 45.0
    """Seconds without a successful renewal after which a worker stops its job itself; less than the lease."""
    cancel_every_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between two checks whether a running job was cancelled."""
    stall_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without progress after which a child process counts as hung and is killed."""
    checkpoint_share: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Fraction of the training time that checkpoints may take; 1 writes one after every epoch."""
    mlflow_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """Timeout in seconds of one call to MLflow; training never waits for it."""

    store_url: str | None = None
    """Bucket for stored files, `s3://bucket/prefix`, with keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""
    store_endpoint: str | None = None
    """Address of an S3-compatible server, such as `https://s3.example.org`; by default AWS in the region."""
    store_region: str = "us-east-1"
    """Region of the bucket; most self-hosted servers accept any."""
    store_cache_bytes: Annotated[int, Field(gt=0)] = 50 * GIB
    """Bytes of local copies of files in the bucket; beyond it the least recently used are evicted."""
    collect_every_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds between two garbage collections of unreferenced files; one worker at a time collects."""
    collect_after_s: Annotated[float, Field(gt=0)] = 86_400.0
    """Minimum age in seconds of an unreferenced file to be deleted; longer than any job needs to reference it."""

    weights_url: str = "https://storage.googleapis.com/tensorflow/keras-applications"
    """Base address of Keras' published weights; may be a mirror."""
    weights_connect_s: Annotated[float, Field(gt=0)] = 5.0
    """Connection timeout in seconds for the weights; short, so that a machine without network reports it soon."""
    weights_stall_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without data after which a download of weights fails."""
    weights_cache: Path = Path("~/.keras/models")
    """Folder of Keras' downloads; a file there with the right MD5 is used."""

    archive_bytes: Annotated[int, Field(gt=0)] = 2 * GIB
    """Maximum bytes of an uploaded archive."""
    archive_entries: Annotated[int, Field(gt=0)] = 200_000
    """Maximum number of files in an archive."""
    archive_inflated_bytes: Annotated[int, Field(gt=0)] = 20 * GIB
    """Maximum bytes of an archive when unpacked."""
    classes: Annotated[int, Field(ge=2)] = 1000
    """Maximum number of classes of a data set."""
    refused_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of an archive's files, from 0 to 1, that may be refused; with more, or a whole class, it is rejected."""
    image_bytes: Annotated[int, Field(gt=0)] = 20 * MIB
    """Maximum bytes of an image file, in an archive and in a prediction."""
    image_pixels: Annotated[int, Field(gt=0)] = 40_000_000
    """Maximum pixels of an image: 40 megapixels take 120 MB when decoded."""
    image_side: Annotated[int, Field(gt=0)] = 16_384
    """Maximum pixels of an image's longer side."""
    image_formats: Annotated[tuple[ImageFormat, ...], NoDecode, Field(min_length=1)] = (
        "JPEG",
        "PNG",
        "WEBP",
        "BMP",
        "GIF",
    )
    """Accepted image formats, separated by commas; TIFF may be added, other decoders had too many vulnerabilities."""
    decode_cpu_s: Annotated[int, Field(gt=0)] = 10
    """Maximum processor seconds to decode an image during ingest."""
    ingest_memory_bytes: Annotated[int, Field(gt=0)] = 3 * GIB // 2
    """Memory limit in bytes of the ingest process; a decoder that needs more is stopped."""
    free_disk_bytes: Annotated[int, Field(ge=0)] = 2 * GIB
    """Minimum free disk bytes to accept an upload."""
    predict_images: Annotated[int, Field(gt=0)] = 32
    """Maximum number of images in a prediction request."""
    predict_bytes: Annotated[int, Field(gt=0)] = 64 * MIB
    """Maximum bytes of a prediction request."""
    predict_waiting: Annotated[int, Field(gt=0)] = 64
    """Images that may wait for the engine of one API process before a prediction is turned away."""
    predict_deadline_s: Annotated[float, Field(gt=0, le=30)] = 5.0
    """Seconds from the first byte of a prediction to its answer: receiving it, loading, decoding and the engine."""
    engine: Literal["auto", "openvino", "onnxruntime"] = "auto"
    """Engine for predictions; `auto` is ONNX Runtime if it finds a GPU with CUDA, else OpenVINO."""
    shelf_bytes: Annotated[int, Field(gt=0)] = 4 * GIB
    """Memory for loaded networks; those not used for longest are dropped beyond it."""

    pixels_bytes: Annotated[int, Field(gt=0)] = 50 * GIB
    """Disk bytes of decoded pixels for fine-tuning; beyond it the least recently used are deleted."""

    @field_validator("allowed_hosts", "queues", "image_formats", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

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
        """Strip whitespace around a key from a file, and refuse what a header cannot hold or anybody can guess."""
        if value is None:
            return None
        key = value.get_secret_value().strip()
        if not key:
            raise ValueError("Expected a key in ESPALIER_API_KEY. Received only spaces. Unset it to use no key.")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                "Expected ESPALIER_API_KEY to hold only printable ASCII characters, since HTTP headers are sent in "
                f"ASCII. {_MAKE_KEY}"
            )
        if len(key) < _KEY_CHARACTERS:
            raise ValueError(
                f"Expected ESPALIER_API_KEY to have at least {_KEY_CHARACTERS} characters. Received {len(key)}, which "
                f"can be guessed. {_MAKE_KEY}"
            )
        return SecretStr(key)

    @model_validator(mode="after")
    def _refuse_open_doors(self) -> Settings:
        if self.api_host not in _LOOPBACK and self.api_key is None:
            raise ValueError(
                f"ESPALIER_API_HOST={self.api_host} would give everyone on the network access. "
                "Set ESPALIER_API_KEY too, or leave the host at 127.0.0.1."
            )
        if not self.renew_every_s < self.let_go_s < self.lease_s:
            raise ValueError("Expected ESPALIER_RENEW_EVERY_S < ESPALIER_LET_GO_S < ESPALIER_LEASE_S.")
        return self

    @property
    def live_s(self) -> float:
        """Seconds within which a worker must have been seen to have jobs sent to it: three of its sweeps."""
        return 3 * self.look_every_s

    @cached_property
    def database(self) -> str:
        """The database address, by default an SQLite file in the data folder."""
        return self.database_url or f"sqlite:///{self.var.absolute() / 'espalier.db'}"

    @cached_property
    def mlflow(self) -> str:
        """The MLflow address that workers use."""
        return self.mlflow_url or f"http://127.0.0.1:{self.mlflow_port}"

    @cached_property
    def mlflow_public(self) -> str:
        """The MLflow address for links that users open."""
        return (self.mlflow_public_url or self.mlflow).rstrip("/")

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
        """The address of stored files. Copies of a bucket have their own folder, apart from original files."""
        return StoreAddress(
            folder=str((self.var / ("store" if self.store_url is None else "cache")).absolute()),
            url=self.store_url,
            endpoint=self.store_endpoint,
            region=self.store_region,
            cache_bytes=self.store_cache_bytes,
        )

    @cached_property
    def features_folder(self) -> Path:
        """Folder of the feature cache."""
        return self.var / "features"

    @cached_property
    def pixels_folder(self) -> Path:
        """Folder of decoded pixels for fine-tuning."""
        return self.var / "pixels"

    @cached_property
    def engine_threads(self) -> int:
        """Number of threads of one network, never 0."""
        return self.threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @cached_property
    def archive_limits(self) -> ArchiveLimits:
        """Upper limits for an archive, from the settings."""
        return ArchiveLimits(entries=self.archive_entries, inflated_bytes=self.archive_inflated_bytes)

    @cached_property
    def image_limits(self) -> ImageLimits:
        """Upper limits for an image, from the settings."""
        return ImageLimits(self.image_bytes, self.image_pixels, self.image_side, self.image_formats)
