"""The OpenAPI document: FastAPI generates it, and this module adds errors as problems and the API key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api import problems
from api.middleware import PUBLIC_PATHS
from api.schemas import Problem

_ERRORS = {
    "422": "The request cannot be used as it is.",
    "4XX": "The request is refused.",
    "5XX": "The service failed, or it is overloaded.",
}


def install(app: FastAPI, *, has_key: bool) -> None:
    """Document every error as a problem. With `has_key`, also document how requests send the API key."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _add_problems(document)
            if has_key:
                _add_key(document)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation says


def _add_problems(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's default errors, which this API never sends
        schemas.pop(name, None)
    schemas["Problem"] = Problem.model_json_schema()
    content = {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for operations in document["paths"].values():
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop("422", None)
            for status, answer in responses.items():
                if status >= "400":  # a route that describes an error of its own
                    answer.setdefault("content", content)
            responses |= {status: {"description": text, "content": content} for status, text in _ERRORS.items()}


def _add_key(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    for path, operations in document["paths"].items():
        if path.startswith(PUBLIC_PATHS):
            for operation in operations.values():
                operation["security"] = []
