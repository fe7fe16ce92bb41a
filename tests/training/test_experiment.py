"""Whole runs in this process: real Keras networks, a real engine, small images."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sample
from experiments import AUGMENTATION, QUICK, SPENT_S, ExperimentRunner, RecordingListener
from exporting import Exports
from safetensors.numpy import load as load_tensors

from artifacts import bundle as bundles
from artifacts import images, neighbours
from artifacts.images import ImageLimits
from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.tensors import load_values
from inference import heads
from inference.engine import OpenVinoEngine
from inference.explain import Explanation
from inference.neighbours import nearest
from inference.predictor import LabelsPrediction, ValuePrediction
from inference.shelf import Shelf
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.recipe import Precision, Recipe, Task
from training import delivery, setup
from training.data.arrays import load_pixels
from training.data.split import make_folds
from training.fitting.fit_task import FitData, FitTask
from training.fitting.head_fit import fit_head
from training.fitting.training_loop import FitHooks
from training.statistics import evaluation


@pytest.fixture
def bench(tmp_path: Path, exports: Exports) -> ExperimentRunner:
    return ExperimentRunner(tmp_path, exports)


def test_a_run_measures_out_of_fold_and_serves_what_it_measured(tmp_path: Path, exports: Exports) -> None:
    bench = ExperimentRunner(tmp_path, exports, is_new=True)
    bench.place = replace(bench.place, bit_depth=12)
    files = sample.coloured(per_class=20)
    rows = bench.rows(files)
    outcome, heard = bench.run(rows)

    assert heard.stages == ["backbone", "features", "folds", "final", "bundle"]
    assert [result.number for result in heard.folds] == [0, 1, 2]
    assert outcome.metrics["accuracy"] > 0.9
    assert outcome.metrics["interval"] == "Wilson, over images; not over retraining"
    assert sum(map(sum, outcome.metrics["confusion"])) == len(rows)
    assert heard.extraction is not None and heard.extraction.computed == len(rows)
    assert outcome.training_s > heard.extraction.seconds + sum(result.seconds for result in heard.folds)

    kept = load_tensors(outcome.files["out-of-fold.safetensors"][0])
    assert kept["folds"].shape == (1, 60) and set(kept["folds"][0]) == {0, 1, 2}
    assert kept["logits"].shape == (1, 60, 3) and kept["logits"].dtype == np.float32
    ordered = sorted(rows, key=lambda row: row.path)
    named = load_values(outcome.files["out-of-fold.safetensors"][0])
    assert named["paths"] == [row.path for row in ordered] and named["labels"] == ["blue", "green", "red"]
    assert named["sha256"] == [row.sha256 for row in ordered]
    truth = np.array([["blue", "green", "red"].index(row.labels[0]) for row in ordered])
    again = evaluation.evaluate(Task.MULTICLASS, ["blue", "green", "red"], truth, kept["logits"][0])
    assert again["confusion"] == outcome.metrics["confusion"]
    assert again["loss"] == pytest.approx(outcome.metrics["loss"])

    predictor = Shelf(bench.store, threads=2, budget_bytes=10**9).predictor(outcome.bundle)
    assert predictor.bundle.bit_depth == 12
    predictions = predictor.predict(list(files.values()), ImageLimits(), deadline_s=120)
    right = [prediction.label == path.split("/")[0] for path, prediction in zip(files, predictions, strict=True)]
    assert np.mean(right) > 0.95

    median = evaluation.median_epoch([result.best_epoch for result in heard.folds])
    assert heard.parts[None].epochs == list(range(1, median + 1))
    for name in ("confusion.png", "curves.png"):
        assert outcome.files[name][0].startswith(b"\x89PNG")
    assert "Accuracy" in outcome.files["report.md"][0].decode()


@pytest.mark.slow
def test_another_head_computes_no_features_and_added_images_only_their_own(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=10))
    first, heard = bench.run(rows)
    assert computed_and_cached(heard) == (30, 0)
    second, heard = bench.run(rows, optimizer={"name": "sgd", "learning_rate": 0.05}, seed=3)
    assert computed_and_cached(heard) == (0, 30)
    assert second.backbone == first.backbone
    more = bench.rows({f"red/more{number}.png": sample.png(5000 + number, (200, 50, 40)) for number in range(10)})
    _, heard = bench.run(rows + more)
    assert computed_and_cached(heard) == (10, 30)


def computed_and_cached(heard: RecordingListener) -> tuple[int, int]:
    assert heard.extraction is not None
    return heard.extraction.computed, heard.extraction.cached


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_unbroken_one(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=10, seed=4))
    change = {
        "head": {"hidden": [8], "dropout": 0.3},
        "epochs": 12,
        "early_stopping": {"patience": 2},
        "class_weights": "auto",
        "folds": {"k": 2},
    }
    unbroken, heard = bench.run(rows, **change)
    assert any(result.stopped == "patience" for result in heard.folds)
    cuts = {(0, "head", 1), (0, "head", 3), (1, "head", 2), (None, "head", 1)}
    broken = bench.run_with_cuts(rows, cuts, **change)
    assert broken.metrics == unbroken.metrics
    assert broken.bundle == unbroken.bundle
    parts = len({part for part, _, _ in cuts})
    assert parts * SPENT_S < broken.training_s < (parts + 1) * SPENT_S, "seconds of all who learned"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("augmentation", "cuts"),
    [
        (None, {(0, "head", 1), (0, "network", 0), (1, "network", 2), (None, "network", 1)}),
        # Heads learn from features and are not augmented.
        (AUGMENTATION, {(0, "network", 1), (None, "network", 1)}),
    ],
)
def test_an_interrupted_fine_tuning_ends_as_an_unbroken_one(
    bench: ExperimentRunner, augmentation: dict[str, Any] | None, cuts: set[tuple[int | None, str, int]]
) -> None:
    rows = bench.rows(sample.coloured(per_class=8))
    change = {**TUNING, "augmentation": augmentation, "epochs": 3, "head": {"dropout": 0.2}}
    unbroken, heard = bench.run(rows, **change)
    assert [result.metrics["kept"] for result in heard.folds] == ["network", "network"]
    broken = bench.run_with_cuts(rows, cuts, **change)
    assert broken.metrics == unbroken.metrics
    one, other = (bundles.load(bench.store.read(outcome.bundle)) for outcome in (unbroken, broken))
    assert np.array_equal(one.golden_output, other.golden_output)  # two exports of one network are not byte-equal
    assert np.array_equal(one.layers[0].kernel, other.layers[0].kernel)


@pytest.mark.slow
def test_a_number_in_its_own_unit_survives_an_interruption(bench: ExperimentRunner) -> None:
    rows = [
        Row(f"{level}.png", bench.store.put(sample.png(level, (level,) * 3)), (), 1e12 + level, None, Split.TRAIN)
        for level in range(40, 180, 4)
    ]
    unbroken, _ = bench.run(rows, epochs=4, folds={"k": 2})
    broken = bench.run_with_cuts(rows, {(0, "head", 2), (1, "head", 1)}, epochs=4, folds={"k": 2})
    assert broken.metrics == unbroken.metrics and broken.bundle == unbroken.bundle


@pytest.mark.slow
def test_the_same_seed_gives_the_same_metrics_and_the_same_bundle(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=10))
    one, _ = bench.run(rows, head={"hidden": [8], "dropout": 0.2})
    same, _ = bench.run(rows, head={"hidden": [8], "dropout": 0.2})
    other, _ = bench.run(rows, head={"hidden": [8], "dropout": 0.2}, seed=1)
    assert one.metrics == same.metrics
    assert one.bundle == same.bundle
    assert other.bundle != one.bundle


@pytest.mark.slow
def test_a_binary_run_has_one_logit_and_an_area_under_the_curve(bench: ExperimentRunner) -> None:
    outcome, _ = bench.run(bench.rows(sample.coloured(per_class=10, classes=2)))
    bundle = bundles.load(bench.store.read(outcome.bundle))
    assert bundle.task is Task.BINARY and bundle.labels == ("blue", "green")
    assert bundle.golden_output.shape == (1, 1)
    assert outcome.metrics["roc_auc"] > 0.9


@pytest.mark.slow
def test_test_images_are_scored_once_and_neither_trained_on_nor_folded(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=12))
    held = [Row(row.path, row.sha256, row.labels, None, None, Split.TEST) for row in rows[::4]]
    rest = [row for row in rows if row.path not in {row.path for row in held}]
    outcome, heard = bench.run(rest + held)
    kept = load_tensors(outcome.files["out-of-fold.safetensors"][0])
    tests = np.array([row.split is Split.TEST for row in sorted(rest + held, key=lambda row: row.path)])
    assert (kept["folds"][0][tests] == -1).all() and np.isnan(kept["logits"][0][tests]).all()
    assert outcome.metrics["test"]["images"] == len(held)
    assert sum(map(sum, outcome.metrics["confusion"])) == len(rest)
    assert all(sum(fold.metrics["images"].values()) == len(rest) for fold in heard.folds)

    # The test images' labels must not matter to what was trained: turn them round and only their score changes.
    turned = [Row(row.path, row.sha256, (rest[0].labels[0],), None, None, Split.TEST) for row in held]
    other, _ = bench.run(rest + turned)
    assert other.bundle == outcome.bundle
    assert other.metrics["test"] != outcome.metrics["test"]


def test_a_fold_learns_from_its_own_rows_and_stops_by_its_validation_rows_alone(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=20, seed=3))
    outcome, heard = bench.run(rows, epochs=4, early_stopping={"patience": 1})
    kept = load_tensors(outcome.files["out-of-fold.safetensors"][0])

    # The same by hand, with nothing of a fold's test rows in reach.
    ordered = sorted(rows, key=lambda row: row.path)
    recipe = Recipe.model_validate(QUICK | {"epochs": 4, "early_stopping": {"patience": 1}})
    engine = OpenVinoEngine(bench.store.path(outcome.backbone), Precision.FLOAT32, 2)
    pixels = [images.decode(bench.store.read(row.sha256), 32, recipe.resize, ImageLimits()) for row in ordered]
    features = engine.features(np.stack(pixels))
    truth = np.array([["blue", "green", "red"].index(row.labels[0]) for row in ordered])
    nothing = np.array([], dtype=np.intp)
    everything = np.arange(len(rows))
    folds = make_folds(
        everything,
        truth,
        np.eye(3, dtype=bool)[truth],
        everything,
        nothing,
        k=3,
        repeats=1,
        validation_fraction=0.15,
        seed=recipe.seed,
    )
    for fold, result in zip(folds, heard.folds, strict=True):
        hidden = features.copy()
        hidden[fold.test] = np.nan
        seed = int(np.random.SeedSequence((recipe.seed, fold.number)).generate_state(1)[0])
        fit = FitTask(fold.train, fold.validation, 4, seed, FitHooks(lambda number, metrics: None))
        alone = fit_head(recipe, FitData(Task.MULTICLASS, 3, hidden, truth), fit)
        assert [epoch["val_loss"] for epoch in alone.trained.history] == pytest.approx(
            [epoch["val_loss"] for epoch in result.history], rel=1e-4
        )
        assert (alone.trained.best_epoch, alone.trained.stopped) == (result.best_epoch, result.stopped)
        assert heads.logits(alone.layers, features[fold.test]) == pytest.approx(
            kept["logits"][0][fold.test], rel=1e-3, abs=1e-3
        )


@pytest.mark.slow
def test_class_names_are_no_formulas(bench: ExperimentRunner) -> None:
    files = {}
    for number in range(8):
        files[f"$5 #1 $10/{number}.png"] = sample.png(number, sample.COLOURS["red"])
        files[f"a$_$b/{number}.png"] = sample.png(100 + number, sample.COLOURS["blue"])
    outcome, _ = bench.run(bench.rows(files), folds={"k": 2})
    assert outcome.files["confusion.png"][0].startswith(b"\x89PNG")
    assert outcome.metrics["baseline"]["is_better"]


@pytest.mark.slow
def test_a_run_on_noise_begins_its_report_with_that(bench: ExperimentRunner) -> None:
    files = {f"{'ab'[number % 2]}/{number}.png": sample.png(number, sample.COLOURS["red"]) for number in range(16)}
    outcome, _ = bench.run(bench.rows(files), folds={"k": 2}, epochs=2)
    assert not outcome.metrics["baseline"]["is_better"]
    first = outcome.files["report.md"][0].decode().split("\n")[2]
    assert first.startswith("**This model is no better than a constant answer that ignores the image:**")


@pytest.mark.slow
def test_repeats_fold_again_and_are_pooled(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=10))
    outcome, heard = bench.run(rows, folds={"k": 2, "repeats": 2})
    assert [result.number for result in heard.folds] == [0, 1, 2, 3]
    assert load_tensors(outcome.files["out-of-fold.safetensors"][0])["folds"].shape == (2, 30)
    assert sum(map(sum, outcome.metrics["confusion"])) == 60


TUNING: dict[str, Any] = {
    "mode": "fine-tuning",
    "features_from": "block2",  # the fewer layers, the sooner TensorFlow has traced them
    "epochs": 1,
    "optimizer": {"learning_rate": 0.002},
    "folds": {"k": 2},
    "fine_tune": {"learning_rate": 1e-5, "epochs": 3},
}


@pytest.mark.slow
def test_a_fine_tuned_network_is_measured_and_served_as_one_of_its_own(bench: ExperimentRunner) -> None:
    files = sample.coloured(per_class=10)
    rows = bench.rows(files)
    outcome, heard = bench.run(rows, **TUNING | {"features_from": "block3"}, augmentation=None)
    assert heard.stages == ["pixels", "backbone", "features", "activations", "folds", "final", "export", "bundle"]
    assert outcome.backbone not in bench.known.exports.values()
    export = outcome.metrics["export"]
    assert export["largest_relative_difference"] < 1e-4 and 0 < export["largest_difference_of_an_answer"] < 1e-3
    assert (export["images"], export["answered_otherwise"]) == (16, 0)
    for result in heard.folds:
        head, network = result.metrics["phases"]
        assert (head["name"], network["name"]) == ("head", "network")
        assert head["epochs"] + network["epochs"] == result.epochs == len(result.history)
        assert network["validation"] < head["validation"] and result.metrics["kept"] == "network"
    predictor = Shelf(bench.store, threads=2, budget_bytes=10**9).predictor(outcome.bundle)
    predictions = predictor.predict(list(files.values()), ImageLimits(), deadline_s=120)
    right = [prediction.label == path.split("/")[0] for path, prediction in zip(files, predictions, strict=True)]
    assert np.mean(right) > 0.9
    part = heard.parts[0]
    assert part.done == sorted(part.done) and part.done[-1] == heard.folds[0].epochs
    of_head = heard.folds[0].metrics["phases"][0]["epochs"]
    assert part.unfrozen_after == of_head, "whoever foretells the end must know that epochs take longer now"
    assert "Fine-tuning: layers from `block3` on" in outcome.files["report.md"][0].decode()


@pytest.mark.slow
def test_where_activations_have_no_room_the_frozen_part_learns_along_and_the_seconds_of_all_count(
    bench: ExperimentRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bench.rows(sample.coloured(per_class=6))
    roomy, _ = bench.run(rows, **TUNING, augmentation=None)

    ahead = [0.0]

    def load_for_an_hour(*given: Any) -> Any:
        ahead[0] = 3600.0
        return load_pixels(*given)

    monkeypatch.setattr(setup, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + ahead[0]))
    monkeypatch.setattr(setup, "load_pixels", load_for_an_hour)
    bench.place = replace(bench.place, pixels_bytes=2 * len(rows) * 32 * 32 * 3)
    outcome, heard = bench.run(rows, **TUNING, augmentation=None)
    assert heard.extraction is not None and heard.extraction.seconds > 3600
    assert outcome.training_s > heard.extraction.seconds + sum(fold.seconds for fold in heard.folds)
    told = "anew in every epoch"
    assert told in outcome.files["report.md"][0].decode() and told not in roomy.files["report.md"][0].decode()
    assert outcome.metrics["loss"] == pytest.approx(roomy.metrics["loss"], rel=0.01)


@pytest.mark.slow
def test_fine_tuning_folds_as_feature_extraction_does(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=8))
    frozen, _ = bench.run(rows, features_from="block2", folds={"k": 2})
    tuned, _ = bench.run(rows, **TUNING, augmentation=None)
    one, other = (load_tensors(run.files["out-of-fold.safetensors"][0]) for run in (frozen, tuned))
    assert np.array_equal(one["folds"], other["folds"])
    assert not np.array_equal(one["logits"], other["logits"])


@pytest.mark.slow
def test_a_network_that_learned_worse_is_not_kept(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=10))
    wild = {"learning_rate": 0.1, "epochs": 1, "warmup_epochs": 0}
    outcome, heard = bench.run(
        rows,
        **TUNING | {"fine_tune": wild, "optimizer": {"name": "adam", "learning_rate": 0.01}, "epochs": 5},
        augmentation=None,
    )
    assert [result.metrics["kept"] for result in heard.folds] == ["head", "head"]
    assert outcome.backbone in bench.known.exports.values()
    assert "export" not in outcome.metrics
    assert "The model uses the frozen network" in outcome.files["report.md"][0].decode()


@pytest.mark.slow
def test_fine_tuning_varies_its_images_unless_told_otherwise_and_shows_how(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=6))
    _, heard = bench.run(rows, **TUNING)
    assert heard.files["augmentations.png"].startswith(b"\x89PNG")
    assert "activations" not in heard.stages, "images that are varied have no activations to keep"


@pytest.mark.slow
def test_a_whole_network_trains_at_its_smallest_size(bench: ExperimentRunner) -> None:
    name = BackboneName.RESNET50
    entry = CATALOGUE[name]
    rows = bench.rows(sample.coloured(per_class=8))
    outcome, _ = bench.run(rows, backbone=name.value, features_from=None, image_size=entry.minimum_size, folds={"k": 2})
    assert [outcome.backbone] == list(bench.known.exports.values())
    assert outcome.metrics["accuracy"] > 0.5
    assert bundles.load(bench.store.read(outcome.bundle)).layers[0].kernel.shape[0] == entry.cuts[entry.last_cut]


TUNED_EARLY = {
    **TUNING,
    "augmentation": None,
    "features_from": "block1",
    "epochs": 6,
    "optimizer": {"learning_rate": 0.05},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{}, TUNED_EARLY])
def test_a_number_is_learned_measured_and_answered_in_its_own_unit(
    bench: ExperimentRunner, mode: dict[str, Any]
) -> None:
    levels = [40 + 2 * number for number in range(72)]
    files = {f"{level}.png": sample.png(level, (level, level, level)) for level in levels}
    rows = [
        Row(path, bench.store.put(data), (), 1e12 + level, None, Split.TRAIN)
        for (path, data), level in zip(files.items(), levels, strict=True)
    ]
    rows[3] = replace(rows[3], split=Split.TEST)
    slowly = {"epochs": 40, "batch_size": 4, "optimizer": {"learning_rate": 0.01}}
    outcome, heard = bench.run(rows, **mode | slowly)
    assert outcome.metrics["r2"] > 0.8
    low, high = outcome.metrics["rmse_ci95"]
    assert low < outcome.metrics["rmse"] < high < 30
    assert outcome.metrics["test"]["images"] == 1 and "rmse_ci95" not in outcome.metrics["test"]
    assert "accuracy" not in outcome.metrics and "accuracy" not in heard.folds[0].history[0]

    assert bundles.load(bench.store.read(outcome.bundle)).labels == ()
    predictor = Shelf(bench.store, threads=2, budget_bytes=10**9).predictor(outcome.bundle)
    predictions = predictor.predict(list(files.values()), ImageLimits(), deadline_s=120)
    answered = [prediction.value for prediction in predictions if isinstance(prediction, ValuePrediction)]
    assert np.abs(np.array(answered) - 1e12 - levels).mean() < 15
    assert outcome.files["values.png"][0].startswith(b"\x89PNG") and "confusion.png" not in outcome.files
    report = outcome.files["report.md"][0].decode()
    assert "Root mean squared error" in report and "with numbers from 1000000000040 to 1000000000182" in report


def test_labels_are_learned_measured_and_answered_each_by_itself(bench: ExperimentRunner) -> None:
    files, wanted = {}, {}
    for number in range(48):
        is_red, is_green = number % 2 == 0, number % 3 == 0
        path = f"{number}.png"
        files[path] = sample.png(number, (200 if is_red else 60, 200 if is_green else 60, 60))
        wanted[path] = ["<i>green"] * is_green + ["red|"] * is_red
    rows = [
        Row(path, bench.store.put(data), tuple(wanted[path]), None, None, Split.TRAIN) for path, data in files.items()
    ]
    outcome, _ = bench.run(rows)
    metrics = outcome.metrics
    assert min(metrics["f1_macro"], metrics["f1_micro"], metrics["accuracy"]) > 0.85
    assert metrics["f1_macro_ci95"][0] <= metrics["f1_macro"] <= metrics["f1_macro_ci95"][1]
    assert [row["label"] for row in metrics["per_class"]] == ["<i>green", "red|"]

    predictor = Shelf(bench.store, threads=2, budget_bytes=10**9).predictor(outcome.bundle)
    predictions = predictor.predict(list(files.values()), ImageLimits(), deadline_s=120)
    right = [
        isinstance(prediction, LabelsPrediction) and prediction.labels == wanted[path]
        for path, prediction in zip(files, predictions, strict=True)
    ]
    assert np.mean(right) > 0.85
    assert outcome.files["labels.png"][0].startswith(b"\x89PNG")
    report = outcome.files["report.md"][0].decode()
    assert "All labels are right in" in report
    assert "| &lt;i&gt;green |" in report and r"| red\| |" in report and "<i>" not in report


# --- precisions -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_int8_run_is_scored_and_served_as_the_quantised_network_that_all_runs_share(bench: ExperimentRunner) -> None:
    files = sample.coloured(per_class=10)
    rows = bench.rows(files)
    outcome, heard = bench.run(rows, precision="int8")
    assert heard.stages == ["backbone", "quantise", "features", "folds", "final", "bundle"]
    bundle = bundles.load(bench.store.read(outcome.bundle))
    (exported,) = bench.known.exports.values()
    assert bundle.precision is Precision.INT8
    assert bundle.backbone == outcome.backbone == bench.known.quantised[exported] != exported
    assert bench.known.facts["images"] == 30
    assert "int8" in outcome.files["report.md"][0].decode()

    predictor = Shelf(bench.store, threads=2, budget_bytes=10**9).predictor(outcome.bundle)
    predictions = predictor.predict(list(files.values()), ImageLimits(), deadline_s=120)
    assert np.mean([one.label == path.split("/")[0] for path, one in zip(files, predictions, strict=True)]) > 0.9

    other = bench.rows(sample.coloured(per_class=8, seed=9))
    second, heard = bench.run(other, precision="int8")
    assert "quantise" not in heard.stages and second.backbone == outcome.backbone
    exact, heard = bench.run(other)
    assert exact.backbone == exported and computed_and_cached(heard) == (24, 0)


@pytest.mark.slow
def test_auto_measures_each_precision_on_the_folds_and_keeps_to_its_choice(
    bench: ExperimentRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenVinoEngine, "precisions", staticmethod(lambda: [Precision.FLOAT32, Precision.INT8]))
    times = {Precision.FLOAT32: 9.0, Precision.INT8: 3.0}
    monkeypatch.setattr(setup, "measure_image_ms", lambda engines, golden, alive: {one: times[one] for one in engines})
    rows = bench.rows(sample.coloured(per_class=10))
    outcome, heard = bench.run(rows, precision="auto")
    assert heard.stages == ["backbone", "quantise", "features", "precision", "folds", "final", "bundle"]
    found = outcome.metrics["precision"]
    scores = {one["precision"]: one["score"] for one in found["tried"]}
    assert computed_and_cached(heard) == (60, 0)
    chosen = "int8" if scores["int8"] >= scores["float32"] - found["margin"] else "float32"
    assert found["chosen"] == chosen and outcome.metrics["accuracy"] == pytest.approx(scores[chosen])
    assert bundles.load(bench.store.read(outcome.bundle)).precision == chosen
    assert f"`{chosen}` is used: the fastest" in outcome.files["report.md"][0].decode()
    for precision in Precision.FLOAT32, Precision.INT8:
        alone, _ = bench.run(rows, precision=precision.value)
        assert alone.metrics["accuracy"] == pytest.approx(scores[precision])

    # The folds that are left after an interruption go on in the precision of those that are done.
    assert bench.known.choice is not None
    bench.known.choice["chosen"] = "float32" if chosen == "int8" else "int8"
    again, heard = bench.run(rows, precision="auto")
    assert not {"precision", "quantise"} & set(heard.stages)
    assert again.metrics["precision"] == found | {"chosen": bench.known.choice["chosen"]}
    assert bundles.load(bench.store.read(again.bundle)).precision == bench.known.choice["chosen"]


@pytest.mark.slow
@pytest.mark.parametrize("is_good", [True, False])
def test_a_network_that_has_learned_answers_in_int8_if_it_is_as_good_on_held_out_rows(
    bench: ExperimentRunner, monkeypatch: pytest.MonkeyPatch, is_good: bool
) -> None:
    monkeypatch.setattr(delivery, "is_as_good", lambda task, score, reference: is_good)
    rows = bench.rows(sample.coloured(per_class=8))
    held = [replace(row, split=Split.TEST) for row in rows[::6]]
    rows = [row for row in rows if row.path not in {one.path for one in held}] + held
    outcome, heard = bench.run(rows, **TUNING, precision="int8", augmentation=None)
    bundle = bundles.load(bench.store.read(outcome.bundle))
    chosen = "int8" if is_good else "float32"
    assert bundle.precision == outcome.metrics["precision"]["chosen"] == chosen
    assert bench.known.quantised == {}  # nobody else can use it
    tried = {one["precision"]: one["score"] for one in outcome.metrics["precision"]["tried"]}
    assert outcome.metrics["accuracy"] == pytest.approx(tried[chosen])
    for fold in heard.outcomes:
        assert fold.logits[Precision.INT8].shape == fold.logits[Precision.FLOAT32].shape
        assert not np.array_equal(fold.logits[Precision.INT8], fold.logits[Precision.FLOAT32])
        assert fold.result.metrics["precisions"]["int8"].keys() == {"accuracy", "loss", "f1_macro"}
    logits = load_tensors(outcome.files["out-of-fold.safetensors"][0])["logits"][0]
    ordered = sorted(rows, key=lambda row: row.path)
    inside = np.array([row.split is Split.TRAIN for row in ordered])
    truth = np.array([["blue", "green", "red"].index(row.labels[0]) for row in ordered])
    assert np.mean(logits[inside].argmax(axis=1) == truth[inside]) == pytest.approx(outcome.metrics["accuracy"])

    predictor = Shelf(bench.store, threads=2, budget_bytes=10**9).predictor(outcome.bundle)
    answers = predictor.predict([bench.store.read(row.sha256) for row in held], ImageLimits(), deadline_s=120)
    right = np.mean([one.label == row.labels[0] for one, row in zip(answers, held, strict=True)])
    assert outcome.metrics["test"]["accuracy"] == pytest.approx(right)
    said = "`int8` is used as requested" if is_good else "`float32` is used instead of `int8`"
    assert said in outcome.files["report.md"][0].decode()


@pytest.mark.slow
def test_a_run_that_keeps_its_training_images_shows_the_nearest(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=10))
    held = [replace(row, split=Split.TEST) for row in rows[::7]]
    rows = [row for row in rows if row.path not in {one.path for one in held}]
    outcome, _ = bench.run(rows + held, neighbours=True)
    digest = bundles.load(bench.store.read(outcome.bundle)).neighbours
    assert digest is not None and bench.store.read(digest) == outcome.files["neighbours.safetensors"][0]
    kept = neighbours.load(bench.store.read(digest))
    assert {one.path for one in kept.images} == {row.path for row in rows}, "a test image is never shown"

    predictor = Shelf(bench.store, threads=2, budget_bytes=10**9).predictor(outcome.bundle)
    before = predictor.size_bytes
    for row in rows[0], rows[-1]:
        file = bench.store.read(row.sha256)
        pixels = images.decode(file, 32, predictor.bundle.resize, ImageLimits())[None]
        asked = predictor.submit(pixels, math.inf)
        assert asked is not None
        [explained] = predictor.explain(Explanation.NEIGHBOURS, None, pixels, asked.result(), [], ImageLimits())
        assert explained.neighbours is not None and explained.neighbours[0].training_image.path == row.path
        assert explained.neighbours[0].similarity == pytest.approx(1, abs=1e-2)
        assert explained.png.startswith(b"\x89PNG")
    assert predictor.size_bytes == before + kept.size_bytes


@pytest.mark.slow
def test_the_nearest_are_those_of_the_network_that_learned(bench: ExperimentRunner) -> None:
    outcome, _ = bench.run(bench.rows(sample.coloured(per_class=8)), **TUNING, neighbours=True)
    bundle = bundles.load(bench.store.read(outcome.bundle))
    assert bundle.neighbours is not None
    kept = neighbours.load(bench.store.read(bundle.neighbours))
    engine = OpenVinoEngine(bench.store.path(bundle.backbone), Precision.FLOAT32, 2)
    files = [bench.store.read(one.image) for one in kept.images]
    pixels = np.stack([images.decode(file, 32, bundle.resize, ImageLimits()) for file in files])
    for row, found in enumerate(nearest(kept, engine.features(pixels))):
        assert found[0].training_image == kept.images[row]
