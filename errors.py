"""Every way in which Espalier fails, as one tree. Knows no HTTP: `api.problems` gives each error its status.

EspalierError
├── NotFound               a name or id that nothing answers to
├── Conflict
│   ├── NameTaken          the name is in use
│   ├── NotReady           the thing exists but is not ready yet, or never will be
│   ├── InUse              something running still needs it
│   └── InFlight           the same request is being answered at this moment
├── Invalid
│   ├── RequestInvalid     a request that does not fit its schema
│   ├── KeyReused          an Idempotency-Key that came with another request before
│   ├── RecipeInvalid      a recipe that cannot be trained, naming its field
│   ├── ArchiveRefused     an archive that breaks a limit or hides something
│   ├── LayoutUnknown      an archive whose folders say no labels
│   ├── DatasetRefused     readable files that make no data set
│   └── ImageRefused       one image that cannot be used
├── TooLarge               a body above its limit
├── AddressTooLong         a URL above its limit
├── HeadersTooLarge        headers above their limit
├── DiskFull               no room for what was sent
├── DeadlineExceeded       an answer that came too late
├── Overloaded             more work than can be admitted
├── Unavailable            a part that the answer needs is away
│   └── StoreUnavailable   the bucket of stored files is away
│       └── StoreRefused   the bucket is not there, or does not let us in
├── Unauthorized           no key, or a wrong one
├── Forbidden              a host or an origin that may not ask
├── WeightsUnavailable     pretrained weights cannot be had
├── WeightsRefused         a weights file that does not fit, or holds code
├── TrainingDiverged       the loss is no longer a number
├── NothingToCompare       no run of a comparison succeeded
├── OutOfMemory            the machine killed the work for its memory
├── Stalled                the work stopped moving
├── Crashed                the work died without a word
├── Corrupt                a file that is not what its digest says
├── BundleRefused          a bundle that this process cannot answer for
│   └── PrecisionUnsupported   an arithmetic that this machine's processor has not
└── EngineMissing          an engine that is asked for and not installed

`Refused` is a value, not an error: one file was refused and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Refused:
    """One file that was refused, and why; the operation as a whole goes on."""

    path: str
    reason: str


class EspalierError(Exception):
    """Something failed inside Espalier; this is a bug if no narrower error says otherwise."""

    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Something broke"
    # Whether the same work may succeed a little later, and whether it only waits for somebody to make room.
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
        """Return the error as plain values, for a row or a pipe."""
        return {"code": self.code, "detail": self.detail, **self.extra}


class NotFound(EspalierError):
    """Nothing answers to this name or id."""

    code = "not-found"


class Conflict(EspalierError):
    """The request is sound, but not in the present state of things."""

    code = "conflict"


class NameTaken(Conflict):
    """The name is already in use."""

    code = "name-taken"


class NotReady(Conflict):
    """The thing exists but is not ready to be used."""

    code = "not-ready"


class InUse(Conflict):
    """Something that is still running needs this."""

    code = "in-use"


class InFlight(Conflict):
    """The same request is being answered at this moment."""

    code = "in-flight"


class Invalid(EspalierError):
    """What was sent cannot be used as it is."""

    code = "invalid"


class RequestInvalid(Invalid):
    """The request does not fit its schema."""

    code = "request-invalid"


class KeyReused(Invalid):
    """The Idempotency-Key came with another request before."""

    code = "key-reused"


class RecipeInvalid(Invalid):
    """The recipe cannot be trained; `field` names the part at fault."""

    code = "recipe-invalid"

    def __init__(self, field: str, detail: str, **extra: Any) -> None:
        super().__init__(detail, field=field, **extra)
        self.field = field


class ArchiveRefused(Invalid):
    """The archive breaks a limit or is built to deceive."""

    code = "archive-refused"


class LayoutUnknown(Invalid):
    """The archive holds neither a folder per class nor a labels.csv."""

    code = "layout-unknown"


class DatasetRefused(Invalid):
    """The files can be read but make no data set."""

    code = "dataset-refused"
    title = "Data set refused"


class ImageRefused(Invalid):
    """The image cannot be used."""

    code = "image-refused"


class TooLarge(EspalierError):
    """The body is above its limit."""

    code = "too-large"


class AddressTooLong(EspalierError):
    """The address is longer than it may be."""

    code = "address-too-long"


class HeadersTooLarge(EspalierError):
    """The headers are larger than they may be."""

    code = "headers-too-large"


class DiskFull(EspalierError):
    """There is no room for what was sent."""

    code = "disk-full"
    is_parked = True


class DeadlineExceeded(EspalierError):
    """The answer was not ready in time."""

    code = "deadline-exceeded"


class Overloaded(EspalierError):
    """More work is waiting than can be admitted."""

    code = "overloaded"


class Unavailable(EspalierError):
    """A part that the answer needs is away."""

    code = "unavailable"
    is_transient = True


class StoreUnavailable(Unavailable):
    """The bucket of stored files is away; whatever needs it waits."""

    code = "store-unavailable"
    is_parked = True


class StoreRefused(StoreUnavailable):
    """The bucket of stored files is not there, or does not let this service in: somebody must change that."""

    code = "store-refused"


class Unauthorized(EspalierError):
    """The API key is missing or wrong."""

    code = "unauthorized"


class Forbidden(EspalierError):
    """This host or origin may not ask."""

    code = "forbidden"


class WeightsUnavailable(EspalierError):
    """The pretrained weights cannot be had."""

    code = "weights-unavailable"


class WeightsRefused(EspalierError):
    """The weights file does not fit the network, or holds more than weights."""

    code = "weights-refused"


class TrainingDiverged(EspalierError):
    """The loss is no longer a number."""

    code = "training-diverged"


class NothingToCompare(EspalierError):
    """No run of the comparison succeeded."""

    code = "nothing-to-compare"


class OutOfMemory(EspalierError):
    """The work was killed for the memory it took."""

    code = "out-of-memory"


class Stalled(EspalierError):
    """The work stopped moving."""

    code = "stalled"


class Crashed(EspalierError):
    """The work died without saying why."""

    code = "crashed"
    is_transient = True


class Corrupt(EspalierError):
    """A file is not what its digest says."""

    code = "corrupt"


class BundleRefused(EspalierError):
    """The bundle cannot be served by this process."""

    code = "bundle-refused"


class PrecisionUnsupported(BundleRefused):
    """The processor of this machine does not compute as the recipe or the bundle asks."""

    code = "precision-unsupported"


class EngineMissing(EspalierError):
    """The engine that is asked for is not installed."""

    code = "engine-missing"


def _tree(root: type[EspalierError]) -> dict[str, type[EspalierError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def errors_by_code() -> Mapping[str, type[EspalierError]]:
    """Return each error class under its code."""
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
