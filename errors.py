"""The tree of all errors that Espalier raises. Knows no HTTP: `api.problems` gives each error its status.

EspalierError
├── NotFound               no such name or id
├── Conflict
│   ├── NameTaken          the name is in use
│   ├── NotReady           something exists, but is not ready or never will be
│   ├── NoChampion         a model whose versions are all too bad to answer by default
│   ├── InUse              something that is still running needs it
│   └── InFlight           the same request is being answered right now
├── Invalid
│   ├── RequestMalformed   bytes that are no HTTP request
│   ├── RequestInvalid     a request that does not fit its schema
│   ├── KeyReused          an Idempotency-Key that was used with another request
│   ├── RecipeInvalid      a recipe that cannot be trained, with the field at fault
│   ├── ArchiveRefused     an archive that exceeds a limit or is malicious
│   ├── LayoutUnknown      an archive with neither class folders nor labels
│   ├── DatasetRefused     readable files that do not make a data set
│   └── ImageRefused       one image that cannot be used
├── RangeUnsatisfiable     a part of a file that begins beyond its end
├── TooLarge               a body above its limit
├── AddressTooLong         a URL above its limit
├── HeadersTooLarge        headers above their limit
├── DiskFull               not enough disk space
├── RequestTimeout         a request that did not arrive in time
├── DeadlineExceeded       an answer that was not ready in time
├── Overloaded             more work than can be admitted
├── Unavailable            a service that is needed does not respond
│   └── StoreUnavailable   the bucket of stored files does not respond
│       └── StoreRefused   the bucket does not exist, or denies access
├── Unauthorized           no API key, or a wrong one
├── KeyThrottled           too many wrong API keys from one address
├── Forbidden              a host or an origin that is not allowed
├── WeightsUnavailable     pretrained weights that cannot be obtained
├── WeightsRefused         a weights file that does not fit, or holds code
├── TrainingDiverged       the loss is infinite or NaN
├── NothingToCompare       no run of a comparison succeeded
├── OutOfMemory            the work was killed because memory ran out
├── Stalled                the work made no progress
├── Crashed                the work ended without a result or an error
├── Corrupt                a file that does not match its digest
├── BundleRefused          a bundle that this process cannot serve
│   └── PrecisionUnsupported   an arithmetic that this processor does not support
└── EngineMissing          an engine that is configured but not installed

`Refused` is a value, not an error: one file was refused, and the operation continues.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Refused:
    """One file that was refused, and why; the operation as a whole continues."""

    path: str
    reason: str


class EspalierError(Exception):
    """The base class of all errors. Code raises this class itself only to report a bug."""

    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Something broke"
    # `is_transient`: the same work may succeed if it is tried again later.
    # `is_parked`: a job with this error waits for disk space or for the store. The wait does not count as an attempt.
    is_transient: ClassVar[bool] = False
    is_parked: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "title" not in cls.__dict__:
            cls.title = cls.code.replace("-", " ").capitalize()

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra

    def record(self) -> dict[str, Any]:
        """Return the error as plain values, to be stored in a database row or sent to another process."""
        return {"code": self.code, "detail": self.detail, **self.extra}


class NotFound(EspalierError):
    """Nothing has this name or id."""

    code = "not-found"


class Conflict(EspalierError):
    """The request is valid, but conflicts with the current state."""

    code = "conflict"


class NameTaken(Conflict):
    """The name is already in use."""

    code = "name-taken"


class NotReady(Conflict):
    """Something exists but is not ready for use, or never will be."""

    code = "not-ready"


class NoChampion(Conflict):
    """No version of the model answers by default, since none is better than a constant answer."""

    code = "no-champion"


class InUse(Conflict):
    """This cannot be changed or deleted while something that is running needs it."""

    code = "in-use"


class InFlight(Conflict):
    """The same request is being answered right now."""

    code = "in-flight"


class Invalid(EspalierError):
    """The request or its data cannot be used as it is."""

    code = "invalid"


class RequestMalformed(Invalid):
    """The bytes on the connection are not a request that HTTP allows here."""

    code = "request-malformed"


class RequestInvalid(Invalid):
    """The request does not fit its schema."""

    code = "request-invalid"


class KeyReused(Invalid):
    """The Idempotency-Key was already used with another request."""

    code = "key-reused"


class RecipeInvalid(Invalid):
    """The recipe cannot be trained; `field` names the part at fault."""

    code = "recipe-invalid"

    def __init__(self, field: str, detail: str, **extra: Any) -> None:
        super().__init__(detail, field=field, **extra)
        self.field = field


class ArchiveRefused(Invalid):
    """The archive is of no known kind, exceeds a limit or is malicious."""

    code = "archive-refused"


class LayoutUnknown(Invalid):
    """The archive contains neither a folder per class nor a labels.csv."""

    code = "layout-unknown"


class DatasetRefused(Invalid):
    """The files are readable but do not make a data set."""

    code = "dataset-refused"
    title = "Data set refused"


class ImageRefused(Invalid):
    """The image is damaged, too large or of an unsupported kind."""

    code = "image-refused"


class RangeUnsatisfiable(EspalierError):
    """The requested part of a file begins beyond its end; `size_bytes` is the size of the file."""

    code = "range-unsatisfiable"


class TooLarge(EspalierError):
    """The request body, or a part of it, exceeds a size limit."""

    code = "too-large"


class AddressTooLong(EspalierError):
    """The URL exceeds the length limit."""

    code = "address-too-long"


class HeadersTooLarge(EspalierError):
    """The request headers together exceed the size limit."""

    code = "headers-too-large"


class DiskFull(EspalierError):
    """There is not enough disk space."""

    code = "disk-full"
    is_parked = True


class RequestTimeout(EspalierError):
    """The request did not arrive in time."""

    code = "request-timeout"


class DeadlineExceeded(EspalierError):
    """The answer was not ready in time."""

    code = "deadline-exceeded"


class Overloaded(EspalierError):
    """Too much work is waiting; try again later."""

    code = "overloaded"


class Unavailable(EspalierError):
    """A service that is needed does not respond, such as the database."""

    code = "unavailable"
    is_transient = True


class StoreUnavailable(Unavailable):
    """The bucket of stored files does not respond; jobs that need it wait."""

    code = "store-unavailable"
    is_parked = True


class StoreRefused(StoreUnavailable):
    """The bucket of stored files does not exist or denies access; an operator must fix that."""

    code = "store-refused"


class Unauthorized(EspalierError):
    """The API key is missing or wrong."""

    code = "unauthorized"


class KeyThrottled(EspalierError):
    """One address sent too many wrong API keys; try again later."""

    code = "key-throttled"
    title = "Too many wrong API keys"


class Forbidden(EspalierError):
    """This host or origin is not allowed."""

    code = "forbidden"


class WeightsUnavailable(EspalierError):
    """The pretrained weights cannot be obtained."""

    code = "weights-unavailable"


class WeightsRefused(EspalierError):
    """The weights file does not fit the network, or contains code."""

    code = "weights-refused"


class TrainingDiverged(EspalierError):
    """The loss is infinite or NaN."""

    code = "training-diverged"


class NothingToCompare(EspalierError):
    """No run of the comparison succeeded."""

    code = "nothing-to-compare"


class OutOfMemory(EspalierError):
    """The work was killed because memory ran out."""

    code = "out-of-memory"


class Stalled(EspalierError):
    """The work made no progress for too long, or its worker was lost at every attempt."""

    code = "stalled"


class Crashed(EspalierError):
    """The process that did the work ended without a result or an error."""

    code = "crashed"
    is_transient = True


class Corrupt(EspalierError):
    """The content of a file does not match its digest or its format."""

    code = "corrupt"


class BundleRefused(EspalierError):
    """This process cannot serve the bundle."""

    code = "bundle-refused"


class PrecisionUnsupported(BundleRefused):
    """The processor of this machine does not support the precision of the recipe or the bundle."""

    code = "precision-unsupported"


class EngineMissing(EspalierError):
    """The configured engine is not installed."""

    code = "engine-missing"


def _tree(root: type[EspalierError]) -> dict[str, type[EspalierError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def errors_by_code() -> Mapping[str, type[EspalierError]]:
    """Return a mapping from each code to its error class."""
    return _tree(EspalierError)


def from_record(record: Mapping[str, Any]) -> EspalierError:
    """Rebuild the error that `EspalierError.record` wrote; an unknown code becomes `EspalierError`."""
    fields = dict(record)
    kind = errors_by_code().get(fields.pop("code", ""), EspalierError)
    error = kind.__new__(kind)
    EspalierError.__init__(error, fields.pop("detail", ""), **fields)
    if isinstance(error, RecipeInvalid):
        error.field = fields.get("field", "")
    return error
