"""Cuts and backbones are tried on a sample: real Keras networks, small images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import sample
from experiments import ExperimentRunner, RecordingListener
from exporting import Exports
from scipy.sparse import csr_array

from artifacts import bundle as bundles
from artifacts.manifest import Row
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.defaults import ClassCount, fill
from recipes.filled import FeatureExtractionRecipe, UndecidedRecipe
from recipes.recipe import Recipe, Task
from training.bake_off import FOLDS, BakeOffResult, _sample
from training.data.split import make_folds
from training.data.targets import Targets
from training.networks import backbones

OPEN: dict[str, Any] = {"features_from": "auto", "epochs": 4, "folds": {"k": 2}}


@pytest.fixture
def bench(tmp_path: Path, exports: Exports) -> ExperimentRunner:
    return ExperimentRunner(tmp_path, exports)


@pytest.fixture
def rows(bench: ExperimentRunner) -> list[Row]:
    return bench.rows(sample.coloured(per_class=8))


def test_every_cut_is_tried_and_the_best_is_served(bench: ExperimentRunner, rows: list[Row]) -> None:
    outcome, heard = bench.run(rows, **OPEN)
    assert heard.stages[:2] == ["bake-off", "backbone"]
    found = outcome.metrics["features"]
    assert [one["features_from"] for one in found["tried"]] == list(CATALOGUE[BackboneName.VGG16].cuts)
    assert [one["width"] for one in found["tried"]] == list(CATALOGUE[BackboneName.VGG16].cuts.values())
    best = max(found["tried"], key=lambda one: one["score"])  # the first of equals
    assert found["chosen"] == best and found["images"] == len(rows) and found["score"] == "accuracy"
    bundle = bundles.load(bench.store.read(outcome.bundle))
    assert bundle.layers[0].kernel.shape[0] == best["width"]
    report = outcome.files["report.md"][0].decode()
    assert "## Where features come from" in report and f"`{best['features_from']}` of VGG16 was chosen" in report


def test_a_run_that_was_interrupted_keeps_to_its_choice(bench: ExperimentRunner, rows: list[Row]) -> None:
    bench.run(rows, **OPEN)
    assert bench.known.pick is not None
    other = next(one for one in bench.known.pick["tried"] if one != bench.known.pick["chosen"])
    bench.known.pick = bench.known.pick | {"chosen": other}
    heard = RecordingListener()
    outcome, _ = bench.run(rows, heard, **OPEN)
    assert "bake-off" not in heard.stages
    assert outcome.metrics["features"]["chosen"] == other
    assert bundles.load(bench.store.read(outcome.bundle)).layers[0].kernel.shape[0] == other["width"]


@pytest.mark.slow
def test_the_choice_changes_nothing_of_the_measurement(bench: ExperimentRunner, rows: list[Row]) -> None:
    chosen, _ = bench.run(rows, **OPEN)
    cut = chosen.metrics["features"]["chosen"]["features_from"]
    fixed, _ = bench.run(rows, **OPEN | {"features_from": cut})
    assert chosen.metrics["loss"] == fixed.metrics["loss"]
    assert chosen.metrics["per_class"] == fixed.metrics["per_class"]


def test_a_rare_class_is_in_every_fold_of_a_sample() -> None:
    labels = np.repeat([0, 1, 2], [3000, 4, 1996])
    targets = Targets(labels, labels, csr_array(np.eye(3, dtype=np.int8)[labels]))
    everything = np.arange(len(labels))
    sample = _sample(everything, targets, everything)
    counts = np.bincount(labels[sample])
    assert counts[1] == FOLDS and 900 < len(sample) < 1100
    folds = make_folds(
        np.arange(len(sample)),
        labels[sample],
        targets.needed[sample],
        sample,
        np.array([], dtype=np.intp),
        k=FOLDS,
        repeats=1,
        validation_fraction=0.15,
        seed=0,
    )
    assert all(1 in labels[sample][fold.train] for fold in folds)


@pytest.mark.slow
def test_of_several_backbones_those_whose_weights_are_here_are_tried(bench: ExperimentRunner, rows: list[Row]) -> None:
    candidates = {name: bench.weights_of(name) for name in (BackboneName.VGG16, BackboneName.VGG19)}
    outcome, _ = bench.run(rows, candidates=candidates, **OPEN | {"backbone": "auto"})
    found = outcome.metrics["features"]
    assert [one["backbone"] for one in found["tried"]] == ["vgg16"] * 5 + ["vgg19"] * 5
    assert found["weights"] == candidates[BackboneName(found["chosen"]["backbone"])]
    bundle = bundles.load(bench.store.read(outcome.bundle))
    assert bundle.layers[0].kernel.shape[0] == found["chosen"]["width"]


@pytest.mark.slow
def test_all_cuts_share_one_pass_and_are_those_that_are_served() -> None:
    weights = backbones.random_weights(BackboneName.RESNET50)
    cuts = list(CATALOGUE[BackboneName.RESNET50].cuts)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    together = backbones.build_multi_cut_network(BackboneName.RESNET50, cuts, 32, weights).predict_on_batch(images)
    assert list(together) == cuts
    for cut, features in together.items():
        alone = backbones.build_backbone(BackboneName.RESNET50, cut, 32, weights)(images)["features"]
        assert features == pytest.approx(keras.ops.convert_to_numpy(alone), rel=1e-4, abs=1e-6)


def test_one_cut_is_as_good_as_several() -> None:
    weights = backbones.random_weights(BackboneName.VGG16)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    alone = backbones.build_multi_cut_network(BackboneName.VGG16, ["block2"], 32, weights).predict_on_batch(images)
    assert alone["block2"].shape == (1, 128)


def test_a_choice_is_kept_as_it_was_and_settles_the_recipe() -> None:
    facts = {
        "chosen": {"backbone": "vgg19", "features_from": "block4", "image_size": 48, "width": 512, "score": 0.9},
        "weights": "0" * 64,
        "score": "accuracy",
        "images": 900,
        "folds": 3,
        "seconds": 4.5,
        "tried": [],
    }
    assert BakeOffResult.of(facts).facts(Task.MULTICLASS) == facts
    recipe = fill(
        Recipe.model_validate({"backbone": "auto", "features_from": "auto"}), Task.BINARY, [ClassCount("a", 9, 9)]
    )
    assert isinstance(recipe, UndecidedRecipe)
    done = BakeOffResult.of(facts).decide(recipe)
    assert (done.backbone, done.features_from, done.image_size) == (BackboneName.VGG19, "block4", 48)
    assert isinstance(done, FeatureExtractionRecipe)


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ({"mode": "fine-tuning", "features_from": "auto"}, "features_from"),
        ({"mode": "fine-tuning", "backbone": "auto"}, "backbone"),
        ({"backbone": "auto", "features_from": "block1"}, "features_from"),
        ({"backbone": "auto", "image_size": 16}, "image_size"),
        ({"backbone": "vgg16", "features_from": "auto", "image_size": 16}, "image_size"),
        ({"features_from": "auto", "image_size": [224, 200]}, "image_size"),
        ({"features_from": "auto", "unfreeze": "block1"}, "unfreeze"),
    ],
)
def test_what_cannot_be_left_open_is_refused(recipe: dict[str, Any], field: str) -> None:
    from errors import RecipeInvalid

    counts = [ClassCount("a", 9, 9), ClassCount("b", 9, 9)]
    with pytest.raises(RecipeInvalid) as refused:
        fill(Recipe.model_validate(recipe), Task.BINARY, counts)
    assert refused.value.field == field


def test_what_is_left_open_stays_open_until_a_worker_has_tried() -> None:
    counts = [ClassCount("a", 9, 9), ClassCount("b", 9, 9)]
    filled = fill(Recipe.model_validate({"backbone": "auto"}), Task.BINARY, counts)
    assert (filled.backbone, filled.features_from, filled.image_size) == ("auto", None, None)
    assert fill(filled, Task.BINARY, counts) == filled
    filled = fill(Recipe.model_validate({"backbone": "vgg16", "features_from": "auto"}), Task.BINARY, counts)
    assert (filled.features_from, filled.image_size) == ("auto", 224)
