"""The code of a model in MLflow's registry. It sends images to the Espalier API, which has the weights and predicts.

MLflow stores a copy of this file with each registered version, and runs it wherever somebody loads that version. So the
file needs only MLflow and the standard library. Espalier itself never imports it.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.request
from typing import Any

import mlflow.models
import mlflow.pyfunc
import pandas as pd


class EspalierModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Predicts images through the HTTP API of Espalier. The input column `image` has the bytes of image files."""

    def load_context(self, context: Any) -> None:
        """Read the address of the API from the model's config.

        The environment variable ESPALIER_URL overrides this address. ESPALIER_API_KEY is sent as the key.
        """
        config = context.model_config
        address = os.environ.get("ESPALIER_URL", config["url"]).rstrip("/")
        self._url = f"{address}/api/v1/models/{config['model']}/predict?version={config['version']}"

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return one row per image, with the columns `label`, `probability`, and `probabilities` (a dict by label)."""
        images = [base64.b64encode(image).decode() for image in model_input["image"]]
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("ESPALIER_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        body = json.dumps({"images": images}).encode()
        request = urllib.request.Request(self._url, body, headers)  # noqa: S310 (the address is the config's)
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return pd.DataFrame(json.load(answer)["predictions"])


mlflow.models.set_model(EspalierModel())
