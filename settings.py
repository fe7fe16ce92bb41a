"""Every setting, with its unit, default and reason. Read by processes only: floor 4 passes plain values down.

Names are prefixed with ESPALIER_, but for DATABASE_URL, REDIS_URL and MLFLOW_TRACKING_URI, which others set too.
`docs/settings.md` is this file as a table; a test keeps the two together.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from artifacts.archive import ArchiveLimits
from artifacts.bucket_store import parse_url
from artifacts.images import ImageLimits
from artifacts.store import StoreAddress

GIB = 1024**3
MIB = 1024**2
ImageFormat = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Settings(BaseSettings):
    """The settings of one process, from the environment."""

    model_config = SettingsConfigDict(
        env_prefix="ESPALIER_",
        # `ESPALIER_API_KEY=$(cat missing)` is no key, and `REDIS_URL=` no broker.
        env_ignore_empty=True,
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    var: Path = Path("var")
    """Folder for everything that is kept: database, stored files, logs."""
    database_url: Annotated[str | None, Field(validation_alias=AliasChoices("DATABASE_URL"))] = None
    """PostgreSQL or SQLite address; by default an SQLite file in the data folder."""
    redis_url: Annotated[str | None, Field(validation_alias=AliasChoices("REDIS_URL"))] = None
    """Redis or Valkey address; `make up` starts a private Valkey if there is none."""
    mlflow_url: Annotated[str | None, Field(validation_alias=AliasChoices("MLFLOW_TRACKING_URI"))] = None
    """Where workers send experiments; by default MLflow on this machine at ESPALIER_MLFLOW_PORT."""
    mlflow_public_url: str | None = None
    """Address of MLflow as browsers see it, for links in answers; by default the one above."""
    api_host: str = "127.0.0.1"
    """Address that the API listens on. Anything but loopback needs a key."""
    api_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port of the API."""
    api_public_url: str | None = None
    """Address of the API as MLflow's readers see it; by default loopback with the API's port."""
    mlflow_port: Annotated[int, Field(ge=1, le=65535)] = 5000
    """Port of the MLflow pages that `make up` starts."""
    api_key: SecretStr | None = None
    """Key that every call must carry as `Authorization: Bearer …`; none: loopback only."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Names that a Host header may carry, separated by commas; by default loopback names, or any once a key is set."""

    queues: Annotated[tuple[str, ...], NoDecode] = ("ingest", "cpu", "tracking")
    """Queues that `make up` starts workers for, separated by commas. A worker without `--queues` serves all of them."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Workers that `make up` starts; several train the folds of a fine-tuning run side by side."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads for one network, 0: as many as processors are at hand. They decide the last digits of a score."""
    look_every_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between two sweeps of a worker: the most that a lost message costs."""
    renew_every_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two signs of life of a job's holder."""
    lease_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a sign of life after which a job is taken over; several times the renewal."""
    let_go_s: Annotated[float, Field(gt=0)] = 45.0
    """Seconds without a renewal after which a holder stops by itself; less than the lease."""
    cancel_every_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between two looks whether a job was cancelled."""
    stall_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without progress after which a child process counts as hung."""
    checkpoint_share: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Share of the training time that checkpoints may take; 1 writes one at the end of every epoch."""
    mlflow_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds that one call to MLflow may take; training never waits for it."""

    store_url: str | None = None
    """Bucket for stored files, `s3://bucket/prefix`; keys: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; none: a folder."""
    store_endpoint: str | None = None
    """Address of an S3-compatible server, such as `https://s3.example.org`; by default that of AWS in the region."""
    store_region: str = "us-east-1"
    """Region of the bucket; servers of one's own mostly take any."""
    store_cache_bytes: Annotated[int, Field(gt=0)] = 50 * GIB
    """Disk for copies of the bucket's files on this machine; those not used for longest are dropped beyond it."""
    collect_every_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds between two collections of files that nothing names any more; one worker at a time collects."""
    collect_after_s: Annotated[float, Field(gt=0)] = 86_400.0
    """Seconds that a file without a name is kept: longer than anything takes from storing a file to naming it."""

    weights_url: str = "https://storage.googleapis.com/tensorflow/keras-applications"
    """Base address of Keras' published weights; set it to a mirror where that cannot be reached."""
    weights_connect_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds to wait for the weights' server, so that a machine without network says so at once."""
    weights_stall_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that a download of weights may stand still."""
    weights_cache: Path = Path("~/.keras/models")
    """Folder where Keras keeps downloads; a file that is there with the right MD5 is used."""

    archive_bytes: Annotated[int, Field(gt=0)] = 2 * GIB
    """Bytes of one uploaded archive at most."""
    archive_entries: Annotated[int, Field(gt=0)] = 200_000
    """Files in one archive at most."""
    archive_inflated_bytes: Annotated[int, Field(gt=0)] = 20 * GIB
    """Bytes that one archive may unpack to."""
    classes: Annotated[int, Field(ge=2)] = 1000
    """Classes of a data set at most."""
    image_bytes: Annotated[int, Field(gt=0)] = 20 * MIB
    """Bytes of one image file at most, in an archive and in a prediction."""
    image_pixels: Annotated[int, Field(gt=0)] = 40_000_000
    """Pixels of one image at most: 40 megapixels take 120 MB decoded."""
    image_side: Annotated[int, Field(gt=0)] = 16_384
    """Pixels of an image's longer side at most."""
    image_formats: Annotated[tuple[ImageFormat, ...], NoDecode, Field(min_length=1)] = (
        "JPEG",
        "PNG",
        "WEBP",
        "BMP",
        "GIF",
    )
    """Formats that are decoded, separated by commas; TIFF may be added, others have had too many holes."""
    decode_cpu_s: Annotated[int, Field(gt=0)] = 10
    """Processor seconds that decoding one image may take while a data set is taken in."""
    ingest_memory_bytes: Annotated[int, Field(gt=0)] = 3 * GIB // 2
    """Memory of the process that takes a data set in: a decoder that wants more is stopped."""
    free_disk_bytes: Annotated[int, Field(ge=0)] = 2 * GIB
    """Bytes that must stay free on the disk for uploads to be accepted."""
    predict_images: Annotated[int, Field(gt=0)] = 32
    """Images in one prediction request at most."""
    predict_bytes: Annotated[int, Field(gt=0)] = 64 * MIB
    """Bytes of one prediction request at most."""
    predict_waiting: Annotated[int, Field(gt=0)] = 64
    """Images that may wait for the engine of one API process before a prediction is turned away."""
    predict_deadline_s: Annotated[float, Field(gt=0, le=30)] = 5.0
    """Seconds that a prediction may wait, once it has arrived: for its model to be loaded and for the engine."""
    engine: Literal["auto", "openvino", "onnxruntime"] = "auto"
    """What runs networks for predictions; `auto`: ONNX Runtime if it finds a GPU with CUDA, else OpenVINO."""
    shelf_bytes: Annotated[int, Field(gt=0)] = 4 * GIB
    """Memory for loaded networks; those not used for longest are dropped beyond it."""

    pixels_bytes: Annotated[int, Field(gt=0)] = 50 * GIB
    """Disk for decoded pixels, which fine-tuning reads; those not used for longest are dropped beyond it."""

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

    @field_validator("api_key")
    @classmethod
    def _strip(cls, value: SecretStr | None) -> SecretStr | None:
        """Drop what surrounds a key in a file: a header could not carry it."""
        if value is None:
            return None
        key = value.get_secret_value().strip()
        if not key:
            raise ValueError("Expected ESPALIER_API_KEY to hold a key. Received only spaces; unset it for none.")
        return SecretStr(key)

    @model_validator(mode="after")
    def _refuse_open_doors(self) -> Settings:
        if self.api_host not in _LOOPBACK and self.api_key is None:
            raise ValueError(
                f"ESPALIER_API_HOST={self.api_host} would let anyone on the network in. "
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
        """The database's address."""
        return self.database_url or f"sqlite:///{self.var.absolute() / 'espalier.db'}"

    @cached_property
    def mlflow(self) -> str:
        """MLflow's address for workers."""
        return self.mlflow_url or f"http://127.0.0.1:{self.mlflow_port}"

    @cached_property
    def mlflow_public(self) -> str:
        """MLflow's address for readers."""
        return (self.mlflow_public_url or self.mlflow).rstrip("/")

    @cached_property
    def api_public(self) -> str:
        """The API's address for readers."""
        return (self.api_public_url or f"http://127.0.0.1:{self.api_port}").rstrip("/")

    @cached_property
    def hosts(self) -> tuple[str, ...]:
        """The Host names that are answered; `*` means any."""
        return self.allowed_hosts or (("*",) if self.api_key else ("127.0.0.1", "localhost", "[::1]"))

    @cached_property
    def store(self) -> StoreAddress:
        """Where stored files are. Copies of a bucket's lie apart from files that are nowhere else."""
        return StoreAddress(
            folder=str((self.var / ("store" if self.store_url is None else "cache")).absolute()),
            url=self.store_url,
            endpoint=self.store_endpoint,
            region=self.store_region,
            cache_bytes=self.store_cache_bytes,
        )

    @cached_property
    def features_folder(self) -> Path:
        """Where the cache of features lies."""
        return self.var / "features"

    @cached_property
    def pixels_folder(self) -> Path:
        """Where decoded pixels lie for fine-tuning."""
        return self.var / "pixels"

    @cached_property
    def engine_threads(self) -> int:
        """Threads for one network."""
        return self.threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @cached_property
    def archive_limits(self) -> ArchiveLimits:
        """What an archive may be at most."""
        return ArchiveLimits(entries=self.archive_entries, inflated_bytes=self.archive_inflated_bytes)

    @cached_property
    def image_limits(self) -> ImageLimits:
        """What an image may be at most."""
        return ImageLimits(self.image_bytes, self.image_pixels, self.image_side, self.image_formats)
