"""Demonstrates the service over HTTP, from upload to prediction. Run as `python -m ops.demo`, or `make demo`.

The demo starts the service, uploads images, trains a model, and predicts images that it has not uploaded. Then it keeps
the service running, or stops it if CI=1 is set.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import re
import shlex
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from artifacts import layout
from artifacts.archive import ArchiveLimits, open_archive
from artifacts.file_names import is_litter
from artifacts.images import encode
from errors import EspalierError, Refused
from ops import up
from ops.up import CannotStart, console
from recipes.headline import HEADLINES
from recipes.recipe import IMAGENET, RANDOM, Task

HELD_OUT = 20
# Few enough that a slow machine answers them within the deadline of one prediction.
_IMAGES_AT_ONCE = 4
# Statuses with which the API answers a prediction while others wait, or whose model takes too long to load.
_BUSY = (503, 504)
_PREDICTED_WITHIN_S = 180.0
_FINAL = ("succeeded", "failed", "cancelled")


class StepFailed(Exception):
    """A step of the demo had an unexpected result. The message says which step and which result."""


@dataclass(frozen=True)
class Files:
    """A named set of files to upload: images, and perhaps a labels.csv, by their paths in the archive."""

    name: str
    contents: dict[str, bytes]


@dataclass(frozen=True)
class HeldOut:
    """An image that the demo does not upload but predicts at the end, with its labels or target."""

    path: str
    labels: tuple[str, ...]
    target: float | None
    data: bytes

    @property
    def truth(self) -> str:
        """The labels or the target of the image as text, to compare with the prediction."""
        return _text(self.labels, self.target)


def main() -> int:
    """Run the demo; return the exit status."""
    arguments = _arguments()
    try:
        settings = up.load_settings()
        with up.running(settings) as supervisor:
            with up.client(settings) as api:
                _demonstrate(api, arguments, settings)
            if os.environ.get("CI") in (None, "", "0", "false"):
                console.print("\nThe service keeps running. [bold]Ctrl-C stops it.[/]")
                supervisor.wait()
    except (CannotStart, StepFailed, EspalierError) as error:
        console.print(str(error), style="bold red", markup=False)
        return 1
    except httpx2.HTTPError as error:
        console.print(
            f"[bold red]The service did not answer: {error!r}. Look for the cause in {settings.var / 'logs'}.[/]"
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder or an archive of images, one folder per class")
    parser.add_argument("--backbone")
    parser.add_argument("--weights", default=IMAGENET)
    parser.add_argument("--features-from")
    parser.add_argument("--image-size", type=int)
    return parser.parse_args([argument for argument in sys.argv[1:] if not argument.endswith("=")])


def _demonstrate(api: httpx2.Client, arguments: argparse.Namespace, settings: Any) -> None:
    console.rule("[bold]Espalier")
    all_files = read_images(arguments.data) if arguments.data else digits()
    files, held_out = hold_out(all_files, HELD_OUT)
    dataset = _upload(api, files)
    run = _train(api, dataset, files.name, _recipe(arguments))
    _print_scores(run)
    _predict(api, run, held_out)
    _print_addresses(run, held_out, settings)


def _recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    # The digits have only 8 x 8 pixels, so a small input and an early layer suffice. Both make the demo fast.
    recipe: dict[str, Any] = {"weights": arguments.weights}
    if arguments.data is None:
        recipe |= {"backbone": "vgg16", "image_size": 32, "features_from": "block3"}
    given = {
        "backbone": arguments.backbone,
        "features_from": arguments.features_from,
        "image_size": arguments.image_size,
    }
    if arguments.backbone and arguments.backbone != recipe.get("backbone"):
        recipe.pop("image_size", None)
        recipe.pop("features_from", None)
    return recipe | {name: value for name, value in given.items() if value}


# --- images --------------------------------------------------------------------------------------------------------


def digits() -> Files:
    """Return scikit-learn's 1,797 handwritten digits as PNG files, in one folder for each digit."""
    from sklearn.datasets import load_digits

    data = load_digits()
    contents = {}
    for number, (pixels, digit) in enumerate(zip(data.images, data.target, strict=True)):
        grey = Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8))
        contents[f"{digit}/{number:04d}.png"] = encode(grey.resize((32, 32), Image.Resampling.BICUBIC), "PNG")
    return Files("digits", contents)


def read_images(path: Path) -> Files:
    """Return the files in a folder or an archive, without hidden files. Raises CannotStart or ArchiveRefused."""
    name = re.sub(r"[^a-z0-9]+", "-", path.absolute().name.split(".")[0].lower()).strip("-") or "images"
    if path.is_dir():
        found = {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}
        contents = {place: file.read_bytes() for place, file in found.items() if not is_litter(place)}
    elif path.is_file():
        archive = open_archive(path, ArchiveLimits())
        paths = [entry.path for entry in archive.entries]
        contents = {place: data for place, data in archive.read(paths) if not isinstance(data, Refused)}
    else:
        raise CannotStart(f"DATA must be a folder or an archive of images, but {path} does not exist or is neither.")
    if not contents:
        raise CannotStart(f"DATA must contain images, but {path} contains no files.")
    return Files(name[:40], contents)


def hold_out(files: Files, count: int) -> tuple[Files, list[HeldOut]]:
    """Separate up to `count` images from the files to upload; return the remaining files and the separated images.

    The images are spread evenly over the classes, with at most a fifth of each class. Images with a group in labels.csv
    always stay, because their predictions would be too good: similar images of the same group are used for training.
    """
    paths = list(files.contents)
    csv_path = layout.labels_file(paths)
    if csv_path is None:
        found = layout.from_folders(paths)
    else:
        found = layout.from_labels(files.contents[csv_path], csv_path, paths)
    by_class: dict[tuple[str, ...], list[layout.Sample]] = defaultdict(list)
    for sample in found.samples:
        if sample.group is None:
            by_class[sample.labels].append(sample)
    taken: list[layout.Sample] = []
    for turn in range(count):
        for samples in by_class.values():
            if len(taken) < count and turn < len(samples) // 5:
                taken.append(samples[-1 - turn])
    gone = {sample.path for sample in taken}
    rest = {path: data for path, data in files.contents.items() if path not in gone}
    if csv_path is not None:
        rest[csv_path] = _labels([sample for sample in found.samples if sample.path not in gone])
    held = [HeldOut(item.path, item.labels, item.target, files.contents[item.path]) for item in taken]
    return Files(files.name, rest), held


def _labels(samples: Sequence[layout.Sample]) -> bytes:
    """Return the content of a labels.csv that lists these samples."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(["path", "label" if samples[0].target is None else "target", "group", "split"])
    for sample in samples:
        what = ("|".join(sample.labels) or "|") if sample.target is None else sample.target
        writer.writerow([sample.path, what, sample.group or "", sample.split.value])
    return buffer.getvalue().encode()


def zipped(files: Files) -> bytes:
    """Return the files as the bytes of a zip archive. Equal files give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path, data in files.contents.items():
            archive.writestr(zipfile.ZipInfo(path), data)  # ZipInfo has a fixed date, so that the bytes are equal
    return buffer.getvalue()


# --- steps ---------------------------------------------------------------------------------------------------------


def _upload(api: httpx2.Client, files: Files) -> dict[str, Any]:
    body = zipped(files)
    # The name contains a hash of the content, so that changed images become another data set.
    name = f"{files.name}-{hashlib.sha256(body).hexdigest()[:8]}"
    dataset = _known_dataset(api, name)
    if dataset is None:
        console.print(f"Uploading {len(files.contents):,} files, {len(body) / 1024**2:.1f} MiB …")
        dataset = _checked(api.post("/api/v1/datasets", params={"name": name}, content=body, timeout=600)).json()
    else:
        console.print(f"Data set [bold]{name}[/] was uploaded before.")
    for state in _watch(api, f"/api/v1/datasets/{dataset['id']}", "ingesting images", ("ready", "rejected")):
        dataset = state
    if dataset["state"] != "ready":
        reasons = "\n".join(f"  {file['path']}: {file['reason']}" for file in dataset["refused"][:10])
        raise StepFailed(f"The images were rejected: {dataset['error']['detail']}\n{reasons}")
    console.print(f"Data set [bold]{name}[/]: {dataset['images']:,} images, {dataset['task']}")
    console.print(f"  {_contents(dataset)}", style="dim", markup=False)
    return dataset


def _contents(dataset: dict[str, Any]) -> str:
    """Return one line that describes the classes or the targets of a data set."""
    if dataset["target"] is not None:
        return "numbers from {min:g} to {max:g}, mean {mean:g}".format(**dataset["target"])
    classes = ", ".join(f"{item['name']} ({item['images']:,})" for item in dataset["classes"][:12])
    return f"{classes}{' …' if len(dataset['classes']) > 12 else ''}"


def _known_dataset(api: httpx2.Client, name: str) -> dict[str, Any] | None:
    """Return the data set with this name; None if there is none or it was rejected, which frees its name."""
    found = _checked(api.get("/api/v1/datasets", params={"name": name})).json()["items"]
    return next((dict(dataset) for dataset in found if dataset["state"] != "rejected"), None)


def _train(api: httpx2.Client, dataset: dict[str, Any], name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    run = _run(api, dataset, name, recipe)
    if run["state"] == "failed" and run["error"]["type"].endswith(":weights-unavailable"):
        loud = " ImageNet weights are not available here: continuing with RANDOM weights. Expect a lower score. "
        console.print(f"[bold white on red]{loud}[/]")
        console.print(run["error"]["detail"], style="dim")
        run = _run(api, dataset, name, recipe | {"weights": RANDOM})
    if run["state"] != "succeeded":
        raise StepFailed(
            f"The run did not succeed. Its state is {run['state']}: {(run['error'] or {}).get('detail', '')}"
        )
    return run


def _run(api: httpx2.Client, dataset: dict[str, Any], name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    body = {"dataset": dataset["id"], "name": name, "recipe": recipe}
    run: dict[str, Any] = _checked(api.post("/api/v1/runs", json=body)).json()
    filled = run["recipe"]
    console.print(
        f"Training [bold]{filled['backbone']}[/] ({filled['weights']}) up to {filled['features_from']} at "
        f"{filled['image_size']} px, {filled['folds']['k']} folds, early stopping"
    )
    for state in _watch(api, f"/api/v1/runs/{run['id']}", "training", _FINAL):
        run = state
    return run


def _watch(api: httpx2.Client, url: str, title: str, until: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Poll a resource until its state is one of `until`, and show a progress bar meanwhile; yield each answer."""
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[eta]}"),
    )
    printed = ""
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0, eta="")
        while True:
            state = _checked(api.get(url)).json()
            progress = state.get("progress") or {}
            description = _description(title, progress)
            eta_s = progress.get("eta_s")
            eta = f"{eta_s:,.0f} s left" if eta_s is not None else ""
            bar.update(task, completed=progress.get("fraction", 0.0), description=description, eta=eta)
            if not console.is_terminal and description != printed:
                printed = description
                console.print(f"  {description}", style="dim")
            yield state
            if state["state"] in until:
                return
            time.sleep(0.5)


def _description(title: str, progress: dict[str, Any]) -> str:
    stage = progress.get("stage", "")
    if progress.get("fold"):
        return f"{title}: fold {progress['fold']} of {progress['folds']}, epoch {progress['epoch']}"
    if progress.get("position"):
        return f"{title}: {stage}, number {progress['position']} in the queue"
    return f"{title}: {stage}" if stage else title


def _print_scores(run: dict[str, Any]) -> None:
    metrics = run["metrics"]
    extraction = run["extraction"]
    headline = HEADLINES[Task(run["recipe"]["task"])]
    spread = headline.formatted(metrics[f"{headline.metric}_sd"])
    console.print(f"\n[bold green]{headline.sentence(metrics)}[/]")
    console.print(
        f"  standard deviation over folds {spread}; each image was scored by the fold that did not train on it",
        style="dim",
    )
    console.print(
        f"  {extraction['computed']:,} images went through the backbone, {extraction['cached']:,} came from the cache",
        style="dim",
    )
    if "confusion" not in metrics:
        console.print("  The report contains a picture of predictions by image.", style="dim")
        return
    labels = [row["label"] for row in metrics["per_class"]]
    if len(labels) > 15:
        console.print(f"  The confusion matrix of {len(labels)} classes is in the report.", style="dim")
        return
    table = Table(title="Confusion matrix: rows are true classes, columns predicted classes")
    table.add_column("")
    for label in labels:
        table.add_column(label, justify="right")
    for label, row in zip(labels, metrics["confusion"], strict=True):
        cells = [
            f"[bold]{count}[/]" if labels[i] == label else (str(count) if count else "·") for i, count in enumerate(row)
        ]
        table.add_row(label, *cells)
    console.print(table)


def _predict(api: httpx2.Client, run: dict[str, Any], held_out: Sequence[HeldOut]) -> None:
    if not held_out:
        console.print("No image was held out: the classes are too small, or grouped.", style="dim")
        return
    pairs: list[tuple[HeldOut, dict[str, Any]]] = []
    spent = 0.0
    until = time.monotonic() + _PREDICTED_WITHIN_S
    for start in range(0, len(held_out), _IMAGES_AT_ONCE):
        part = held_out[start : start + _IMAGES_AT_ONCE]
        answer = _predict_part(api, run["model"], part, until)
        spent += sum(answer["timings_ms"].values())
        pairs += zip(part, answer["predictions"], strict=True)
    result = _result(pairs)
    console.print(f"Predicted {len(pairs)} images that were never uploaded: [bold]{result}[/], in {spent:.0f} ms")
    for image, prediction in pairs[:5]:
        sure = f" ({prediction['probability']:.0%})" if "probability" in prediction else ""
        console.print(f"  {image.path}: {_answered(prediction)}{sure}; it is {image.truth}", markup=False)


def _predict_part(api: httpx2.Client, model: dict[str, Any], part: Sequence[HeldOut], until: float) -> dict[str, Any]:
    """Return the answer for some images; while the machine is too busy for them, ask again."""
    images = [("images", (Path(image.path).name, image.data)) for image in part]
    url = f"/api/v1/models/{model['name']}/predict"
    while True:
        found = api.post(url, params={"version": model["version"]}, files=images)
        if found.status_code not in _BUSY or time.monotonic() > until:
            return dict(_checked(found).json())
        time.sleep(float(found.headers.get("Retry-After", 1)))


def _result(pairs: Sequence[tuple[HeldOut, dict[str, Any]]]) -> str:
    """Return how many predictions are correct, or the mean absolute error of a regression, as text."""
    errors = [abs(prediction["value"] - image.target) for image, prediction in pairs if image.target is not None]
    if errors:
        return f"{sum(errors) / len(errors):.3g} mean absolute error"
    return f"{sum(_answered(prediction) == image.truth for image, prediction in pairs)} right"


def _answered(prediction: dict[str, Any]) -> str:
    """Return a prediction as text, for a model of any task."""
    if "label" in prediction:
        return str(prediction["label"])
    return _text(prediction.get("labels", []), prediction.get("value"))


def _text(labels: Sequence[str], value: float | None) -> str:
    return " + ".join(labels) or "none of the labels" if value is None else f"{value:.4g}"


def _print_addresses(run: dict[str, Any], held_out: Sequence[HeldOut], settings: Any) -> None:
    console.print()
    console.print(up.addresses(settings))
    with up.client(settings) as api:
        shown = _checked(api.get(f"/api/v1/runs/{run['id']}")).json()
        until = time.monotonic() + 30
        while shown["mlflow_url"] is None and time.monotonic() < until:
            time.sleep(0.5)
            shown = _checked(api.get(f"/api/v1/runs/{run['id']}")).json()
    console.print(f"Run     {shown['mlflow_url'] or 'not in MLflow yet, look again in a moment'}")
    if held_out:
        example = settings.var.absolute() / f"example{Path(held_out[0].path).suffix}"
        example.write_bytes(held_out[0].data)
        key = " -H 'Authorization: Bearer …'" if settings.api_key else ""
        command = f"curl{key} --data-binary @{shlex.quote(str(example))} "
        command += f"http://127.0.0.1:{settings.api_port}/api/v1/models/{run['model']['name']}/predict"
        console.print("Try     ", end="")
        console.print(command, style="bold", soft_wrap=True)


def _checked(response: httpx2.Response) -> httpx2.Response:
    """Return a response if it is successful. Otherwise raise StepFailed with the problem's detail."""
    if response.is_success:
        return response
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError):
        detail = response.text[:500]
    raise StepFailed(f"{response.request.method} {response.request.url}: {response.status_code} {detail}")


if __name__ == "__main__":
    sys.exit(main())
