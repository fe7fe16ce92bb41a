"""MLflow's server as an ASGI app that serves only tracking, the model registry and their pages.

MLflow has no login, so anyone who reaches its port could use every path of it. Its assistant runs commands, its gateway
stores keys and sends requests, its webhooks and jobs send requests to other addresses, and an experiment may name any
folder of the machine as the place of its files. Espalier needs none of these, so this app refuses them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flask import Response, request

# The public app of MLflow's server, with its Flask app, in which its REST API lives.
from mlflow.server import app as flask_app
from mlflow.server.fastapi_app import app as mlflow_app

Message = MutableMapping[str, Any]

_RESOURCES = "experiments|runs|metrics|artifacts|registered-models|model-versions|logged-models"
_SERVED = re.compile(
    r"/|/graphql|/health|/version|/get-artifact|/model-versions/get-artifact|/static-files/.+"
    rf"|/(ajax-)?api/2\.0/mlflow/({_RESOURCES})(/.+)?"
    # MLflow registers this path without a slash.
    r"|/(ajax-)?api/2\.0mlflow/experiments/search-datasets"
    r"|/(ajax-)?api/2\.0/mlflow-artifacts/.+"
    # Pages ask for these at every visit: what the server can do, that telemetry is off, that a run has no traces.
    r"|/(ajax-)?api/3\.0/mlflow/(server-info|ui-telemetry|traces/search)"
)
# This path would run a prompt through the gateway.
_NOT_SERVED = re.compile(r".*/runs/create-promptlab-run")
_PROXIED = "mlflow-artifacts:"


def is_served(path: str) -> bool:
    """Return whether a path is one that tracking, the registry or their pages need."""
    return bool(_SERVED.fullmatch(path)) and not _NOT_SERVED.fullmatch(path)


async def app(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Pass a request to MLflow if its path is served. Otherwise answer 404 in the format of MLflow's own errors."""
    if scope["type"] == "lifespan" or (scope["type"] == "http" and is_served(scope["path"])):
        await mlflow_app(scope, receive, send)
    elif scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
    else:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_NOT_HERE)).encode())]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": _NOT_HERE})


_NOT_HERE = json.dumps(
    {"error_code": "ENDPOINT_NOT_FOUND", "message": "Espalier serves only MLflow's tracking and model registry."}
).encode()


@flask_app.before_request
def refuse_other_folders() -> Response | None:
    """Refuse an experiment whose files would lie outside the server's own folder of artifacts.

    Files of a run are read and written with the rights of this process, wherever the experiment says that they are.
    """
    if not request.path.endswith("/mlflow/experiments/create"):
        return None
    body = request.get_json(force=True, silent=True)
    if not isinstance(body, dict):
        return _refusal("Expected a JSON object.")
    # MLflow reads its JSON by the names of Protocol Buffers, which has two spellings.
    wanted = [value for name in ("artifact_location", "artifactLocation") if (value := body.get(name))]
    if any(not isinstance(value, str) or not value.startswith(_PROXIED) for value in wanted):
        return _refusal(f"Expected no artifact_location, or one that begins with '{_PROXIED}'. Received {wanted[0]}.")
    return None


def _refusal(message: str) -> Response:
    body = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": message})
    return Response(body, status=400, mimetype="application/json")
