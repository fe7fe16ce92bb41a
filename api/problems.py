"""Converts errors to problems (RFC 9457) and their HTTP status. No other module knows the status of an error."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path

import errors
from errors import EspalierError, RecipeInvalid, RequestInvalid

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:espalier:problem:"
RETRY_AFTER_S = 1
# Validation errors that one answer lists.
ERRORS_SHOWN = 20
# nginx logs this status when a client disconnects before the answer; no standard defines one.
CLIENT_CLOSED_REQUEST = 499

log = structlog.get_logger()

# The HTTP status of each error class. A test checks that no class of `errors` is missing.
TABLE: Mapping[type[EspalierError], int] = {
    EspalierError: 500,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.NameTaken: 409,
    errors.NotReady: 409,
    errors.NoChampion: 409,
    errors.InUse: 409,
    errors.InFlight: 409,
    errors.Invalid: 422,
    errors.RequestMalformed: 400,
    errors.RequestInvalid: 422,
    errors.KeyReused: 422,
    errors.RecipeInvalid: 422,
    errors.ArchiveRefused: 422,
    errors.LayoutUnknown: 422,
    errors.DatasetRefused: 422,
    errors.ImageRefused: 422,
    errors.RangeUnsatisfiable: 416,
    errors.TooLarge: 413,
    errors.AddressTooLong: 414,
    errors.HeadersTooLarge: 431,
    errors.DiskFull: 507,
    errors.RequestTimeout: 408,
    errors.DeadlineExceeded: 504,
    errors.Overloaded: 503,
    errors.Unavailable: 503,
    errors.StoreUnavailable: 503,
    errors.StoreRefused: 503,
    errors.Unauthorized: 401,
    errors.KeyThrottled: 429,
    errors.Forbidden: 403,
    errors.WeightsUnavailable: 503,
    errors.WeightsRefused: 422,
    errors.TrainingDiverged: 422,
    errors.NothingToCompare: 422,
    errors.OutOfMemory: 500,
    errors.Stalled: 500,
    errors.Crashed: 500,
    errors.Corrupt: 500,
    errors.BundleRefused: 500,
    errors.PrecisionUnsupported: 500,
    errors.EngineMissing: 500,
}

Problem = dict[str, Any]


def problem(record: Mapping[str, Any]) -> Problem:
    """Return the problem for an error record, which `EspalierError.record` has made."""
    fields = dict(record)
    kind = errors.errors_by_code().get(fields.pop("code"), EspalierError)
    detail = fields.pop("detail")
    return {"type": TYPE_PREFIX + kind.code, "title": kind.title, "status": TABLE[kind], "detail": detail, **fields}


def stored_problem(record: Mapping[str, Any] | None) -> Problem | None:
    """Return the problem for an error record from a database row; None if the row has none."""
    return None if record is None else problem(record)


def response(error: EspalierError, request_id: str) -> JSONResponse:
    """Return the HTTP answer for an error. A 503 has the header `Retry-After`."""
    content = problem(error.record())
    return _answer(content, request_id)


def _answer(content: Problem, request_id: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    extra = dict(headers or {})
    if content["status"] == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if content["status"] in (429, 503):
        extra["Retry-After"] = str(math.ceil(content.get("retry_after_s", RETRY_AFTER_S)))
    if content["type"] == TYPE_PREFIX + errors.RangeUnsatisfiable.code:
        extra["Content-Range"] = f"bytes */{content['size_bytes']}"
    return ProblemResponse({**content, "request_id": request_id}, content["status"], extra)


class ProblemResponse(JSONResponse):
    """A problem as JSON. Half of a surrogate pair has no encoding, so it is written as an escape."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def request_id(request: Request) -> str:
    """Return the request's id, which `api.middleware` has assigned."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def install(app: FastAPI) -> None:
    """Install exception handlers, so that the app answers every error with a problem.

    The handlers are coroutines, because plain functions would wait for a free thread.
    """

    @app.exception_handler(EspalierError)
    async def known(request: Request, error: EspalierError) -> JSONResponse:
        return response(error, request_id(request))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return response(_invalid(error), request_id(request))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        if status < 300:  # a route may raise 204 to end a request early
            return Response(status_code=status)
        detail, headers = f"{error.detail}: {request.method} {request.url.path}.", dict(error.headers or {})
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(_methods(request))
            detail += f" The path allows {headers['Allow']}."
        elif status is HTTPStatus.NOT_FOUND:
            detail += " The page /docs lists all paths."
        content: Problem = {
            "type": TYPE_PREFIX + status.phrase.lower().replace(" ", "-"),
            "title": status.phrase,
            "status": status.value,
            "detail": detail,
        }
        return _answer(content, request_id(request), headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        log.info("client left", path=request.url.path)
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # no client receives it, but the metrics count it

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        log.exception("request broke", path=request.url.path, exc_info=error)
        broken = EspalierError("This is a bug in Espalier. The API's log has the details under this request_id.")
        return response(broken, request_id(request))


def _methods(request: Request) -> list[str]:
    """Return all methods that the path of a request allows. The framework knows only those of one route at a time."""
    found = set()
    for path, operations in request.app.openapi()["paths"].items():
        if compile_path(path)[0].match(request.url.path):
            found |= {method.upper() for method in operations}
    return sorted(found | {"HEAD"} if "GET" in found else found)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


def short_repr(value: object) -> str:
    """Return the repr of a value, shortened for an error message."""
    return _SHORT.repr(value)


def expected_and_received(error: ErrorDetails) -> tuple[str, str]:
    """Return what a validation error says was expected, and the received value, as two phrases for a message."""
    if error["type"] == "json_invalid":
        return "Expected JSON", f"something else: {error['ctx']['error']}"
    expected = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_not_found":
        expected = f"Expected a field {error['ctx']['discriminator']}"
    return expected[:1].upper() + expected[1:], "nothing" if error["type"] == "missing" else short_repr(error["input"])


def _invalid(error: RequestValidationError) -> EspalierError:
    """Return the error for a request that failed validation. It names fields by their paths in the request."""
    found = []
    items = error.errors()
    for item in items[:ERRORS_SHOWN]:
        message, received = expected_and_received(item)
        found.append({"field": _field(item, error.body), "message": message, "received": received})
    first = found[0]
    detail = f"{first['field']}: {first['message']}. Received {first['received']}."
    if len(items) > 1:
        first_only = "" if len(found) == len(items) else f" first {len(found) - 1} of"
        detail += f" 'errors' lists the{first_only} {len(items) - 1} more."
    if first["field"].startswith(_RECIPES):
        return RecipeInvalid(first["field"], detail, errors=found)
    return RequestInvalid(detail, field=first["field"], errors=found)


# Errors in fields whose names start like this are reported as RecipeInvalid.
_RECIPES = ("recipe", "network")


def _field(error: ErrorDetails, body: object) -> str:
    """Return the path of an invalid field in the request, or `body` if the body as a whole is invalid."""
    where, *path = error["loc"]
    if not path or error["type"] == "json_invalid":
        return str(where)
    if where != "body":
        return field_path(path)
    missing = path[-1:] if error["type"] == "missing" else []
    return field_path([*_written(path, body), *missing]) or str(where)


def _written(path: Sequence[int | str], body: object) -> list[int | str]:
    """Return the path of a field as it is in the request.

    Pydantic adds names of alternatives to its paths, such as the type of a layer. These are not in the request's body.
    """
    found = []
    for part in path:
        match body:
            case dict() if part in body:
                body = body[part]
            case list() if isinstance(part, int) and part < len(body):
                body = body[part]
            case _:
                continue
        found.append(part)
    return found


def field_path(path: Iterable[int | str]) -> str:
    """Return the path of a field as text, for example `recipes[1].folds.k`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
