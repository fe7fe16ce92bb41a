"""Fine-tuning real networks at their smallest sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import sample
from experiments import RecordingFitListener

from artifacts.features import Features
from artifacts.images import Pixels
from benchmarks.networks import calibrated
from errors import TrainingDiverged
from inference import heads
from inference.engine import OpenVinoEngine
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.defaults import ClassCount, fill
from recipes.recipe import Precision, Recipe, Task
from training.data.split import Indices
from training.data.targets import Truth
from training.fitting import fine_tuning, learners, training_loop
from training.fitting.fine_tuning import FineTuningData, fine_tune
from training.fitting.fit_task import FitData, FitTask, FittedNetwork
from training.fitting.head_fit import FittedHead, fit_head
from training.fitting.learners import LearningTask
from training.fitting.training_loop import FitHooks, Snapshot
from training.networks import backbones
from training.networks.export import export
from training.progress import Epoch

NONE = np.array([], dtype=np.intp)
QUIET = FitHooks(lambda number, metrics: None)
COUNT = 24
# VGG16 has 1.5 million weights in its third block, and 13 million in the two after it.
FEW = {"features_from": "block3", "unfreeze": "block3"}


def recipe(name: str = "vgg16", **change: Any) -> Recipe:
    given = {
        "mode": "fine-tuning",
        "backbone": name,
        "weights": "random",
        **(FEW if name == "vgg16" else {}),
        "image_size": CATALOGUE[BackboneName(name)].minimum_size,
        "augmentation": None,
        "batch_size": 8,
        "optimizer": {"learning_rate": 0.01},
        "fine_tune": {"learning_rate": 1e-4, "epochs": 3},
        **change,
    }
    classes = [ClassCount(label, 99, 99) for label in ("blue", "green", "red")]
    return fill(Recipe.model_validate(given), Task.MULTICLASS, classes)


def pictures(size: int) -> tuple[Pixels, Indices]:
    colours = list(sample.COLOURS.values())[:3]
    squares = [np.asarray(sample.picture(number, colours[number % 3], size)) for number in range(COUNT)]
    return np.stack(squares), np.arange(COUNT) % 3


@lru_cache(maxsize=1)
def beginning(name: BackboneName, cut: str, size: int) -> tuple[bytes, Features]:
    """Return weights of a network, and its features of `pictures` at a cut; most tests begin with the same ones."""
    pixels, _ = pictures(size)
    weights = calibrated(name, pixels)
    features = np.asarray(backbones.build_backbone(name, cut, size, weights)(pixels)["features"])
    features.flags.writeable = False
    return weights, features


class Trial:
    """A network, a head that has learned on its frozen features, and what is needed to go on from there."""

    def __init__(
        self, wanted: Recipe, head_epochs: int = 5, task: Task = Task.MULTICLASS, targets: Truth | None = None
    ) -> None:
        assert wanted.image_size and wanted.features_from
        self.recipe, self.task = wanted, task
        self.pixels, classes = pictures(wanted.image_size)
        self.truth = classes if targets is None else targets
        self.weights, self.features = beginning(wanted.backbone, wanted.features_from, wanted.image_size)
        self.rows = np.arange(COUNT)
        self.outputs = 3 if targets is None else 1 if targets.ndim == 1 else targets.shape[1]
        self.head: FittedHead = fit_head(
            wanted, self.feature_data, FitTask(self.rows, NONE, epochs=head_epochs, seed=0, hooks=QUIET)
        )

    @property
    def feature_data(self) -> FitData:
        return FitData(self.task, self.outputs, self.features, self.truth)

    def data(self, inputs: Any, are_maps: bool) -> FineTuningData:
        return FineTuningData(self.task, self.outputs, inputs, self.truth, are_maps)

    def fine_tune(self, data: FineTuningData | None = None, **change: Any) -> FittedNetwork:
        is_validation = self.rows % 4 == 0
        fit = FitTask(self.rows[~is_validation], self.rows[is_validation], epochs=3, seed=0, hooks=QUIET)
        data = data or self.data(self.pixels, are_maps=False)
        return fine_tune(self.recipe, data, self.weights, self.head, replace(fit, **change))

    def maps(self) -> FineTuningData:
        """Return the maps at the cut, by Keras."""
        boundary = CATALOGUE[self.recipe.backbone].cut_before(self.recipe.unfreeze or "")
        assert boundary and self.recipe.image_size
        network = backbones.build_backbone(self.recipe.backbone, boundary, self.recipe.image_size, self.weights)
        return self.data(np.asarray(network(self.pixels)["maps"]), are_maps=True)


def changed(before: bytes, after: bytes, wanted: Recipe) -> dict[str, bool]:
    """Return by layer whether its weights changed."""
    assert wanted.image_size
    found: dict[str, bool] = {}
    networks = []
    for weights in (before, after):
        network = backbones.build_network(wanted.backbone, wanted.image_size)
        backbones.load_weights(network, weights)
        networks.append(network)
    for one, other in zip(networks[0].layers, networks[1].layers, strict=True):
        if one.weights:
            pairs = zip(one.get_weights(), other.get_weights(), strict=True)
            found[one.name] = not all(np.array_equal(a, b) for a, b in pairs)
    return found


@pytest.mark.slow
def test_an_untrained_network_answers_as_the_head_on_frozen_features_did() -> None:
    trial = Trial(recipe(fine_tune={"learning_rate": 1e-12, "epochs": 1}))
    before = heads.logits(trial.head.layers, trial.features)
    for data in (None, trial.maps()):
        tuned = trial.fine_tune(data, epochs=1)
        assert tuned.logits(trial.rows) == pytest.approx(before, rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (Task.REGRESSION, 1900.0 + 10 * (np.arange(COUNT) % 3)[:, None]),
        (Task.BINARY, (np.arange(COUNT) % 3 > 0).astype(np.int64)),
        (Task.MULTILABEL, np.stack([np.arange(COUNT) % 3 > 0, np.arange(COUNT) % 3 < 2], axis=1).astype(np.float32)),
    ],
)
def test_numbers_sides_and_labels_are_tuned_too_and_answered_as_keras_does(task: Task, targets: Truth) -> None:
    trial = Trial(recipe(fine_tune={"learning_rate": 1e-6, "epochs": 2}), task=task, targets=targets)
    assert trial.recipe.features_from and trial.recipe.image_size
    tuned = trial.fine_tune(epochs=2)
    network = backbones.build_backbone(
        trial.recipe.backbone, trial.recipe.features_from, trial.recipe.image_size, tuned.network()
    )
    again = heads.logits(tuned.layers, np.asarray(network(trial.pixels)["features"]))
    scale = targets.std() if task is Task.REGRESSION else 1.0
    assert tuned.logits(trial.rows) / scale == pytest.approx(again / scale, abs=5e-3)
    if task is Task.REGRESSION:
        assert np.abs(again - targets).mean() < targets.std(), "in the unit of the targets"


def test_layers_from_the_cut_on_learn_and_those_before_it_do_not() -> None:
    trial = Trial(recipe(unfreeze="block2"))
    tuned = trial.fine_tune(trial.maps())
    found = changed(trial.weights, tuned.network(), trial.recipe)
    assert all(has_changed == ("block2" <= name < "block4") for name, has_changed in found.items())


@pytest.mark.slow
def test_everything_learns_if_asked() -> None:
    trial = Trial(recipe(unfreeze="all"))
    found = changed(trial.weights, trial.fine_tune().network(), trial.recipe)
    assert all(has_changed == (name < "block4") for name, has_changed in found.items())


@pytest.mark.slow
def test_batch_normalisation_stays_as_it_is() -> None:
    trial = Trial(recipe("resnet50", features_from="conv3", unfreeze="all"))
    tuned = trial.fine_tune(epochs=1)
    one, other = (backbones.build_network(trial.recipe.backbone, 32) for _ in range(2))
    backbones.load_weights(one, trial.weights)
    backbones.load_weights(other, tuned.network())
    pairs = zip(one.layers, other.layers, strict=True)
    statistics = [(a, b) for a, b in pairs if isinstance(a, keras.layers.BatchNormalization)]
    assert len(statistics) > 40
    for a, b in statistics:
        assert all(np.array_equal(x, y) for x, y in zip(a.get_weights(), b.get_weights(), strict=True))


@pytest.mark.slow
def test_the_loss_falls_and_every_epoch_is_told() -> None:
    told: list[tuple[int, Epoch]] = []
    # Random weights make tiny features, and standardising those makes small steps large.
    trial = Trial(recipe(unfreeze="block2", fine_tune={"learning_rate": 1e-7, "epochs": 3}), head_epochs=1)
    tuned = trial.fine_tune(hooks=FitHooks(lambda number, metrics: told.append((number, metrics))))
    assert [number for number, _ in told] == [1, 2, 3]
    assert tuned.trained.history[-1]["loss"] < tuned.trained.history[0]["loss"]
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= tuned.trained.history[0].keys()


@pytest.mark.slow
def test_long_predictions_show_that_they_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "_MOST_IMAGES", 8)
    beats: list[float] = []
    trial = Trial(recipe())
    tuned = trial.fine_tune(epochs=2, hooks=FitHooks(lambda number, metrics: None, beats.append))
    beats.clear()
    tuned.logits(trial.rows)
    assert beats == [2.0] * -(-COUNT // 8)


@pytest.mark.slow
def test_classes_weigh_what_they_are_given_while_the_network_learns() -> None:
    few = np.arange(0, COUNT, 3)[1:]  # one image of the first class is left to learn from
    train = np.setdiff1d(np.arange(COUNT), few)
    rates = {"fine_tune": {"learning_rate": 1e-12, "epochs": 1}, "head": {"l2": 0.0}}
    plain, weighed = (
        Trial(recipe(**rates, class_weights=weights), head_epochs=1).fine_tune(train=train, validation=NONE, epochs=1)
        for weights in ("none", "auto")
    )
    logits = plain.logits(train)
    truth = train % 3
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(train)), truth]
    weights = len(train) / (3 * np.bincount(truth))
    assert plain.trained.history[0]["loss"] == pytest.approx(losses.mean(), rel=1e-3)
    assert weighed.trained.history[0]["loss"] == pytest.approx((losses * weights[truth]).mean(), rel=1e-3)


@pytest.mark.slow
def test_a_snapshot_of_other_code_is_not_gone_on_from() -> None:
    trial = Trial(recipe())
    kept: list[Snapshot] = []
    unbroken = trial.fine_tune(hooks=FitHooks(lambda number, metrics: None, offer=lambda take: kept.append(take())))
    variables = [variable[..., :-1] for variable in kept[0].variables]
    tuned = trial.fine_tune(hooks=FitHooks(lambda number, metrics: None, since=replace(kept[0], variables=variables)))
    assert tuned.trained == unbroken.trained


@pytest.mark.slow
def test_the_best_weights_are_kept_and_patience_ends_it() -> None:
    trial = Trial(
        recipe(
            features_from="block5",
            unfreeze="block5",
            early_stopping={"patience": 1},
            fine_tune={"learning_rate": 0.5, "epochs": 12, "warmup_epochs": 0},
            optimizer={"name": "sgd", "learning_rate": 0.01},
        )
    )
    tuned = trial.fine_tune(epochs=12)
    watched = [epoch["val_loss"] for epoch in tuned.trained.history]
    assert tuned.trained.best_epoch == int(np.argmin(watched)) + 1
    assert tuned.trained.stopped == "patience" and len(watched) == tuned.trained.best_epoch + 1
    rows = trial.rows[trial.rows % 4 == 0]
    right = (tuned.logits(rows).argmax(axis=1) == trial.truth[rows]).mean()
    assert right == pytest.approx(tuned.trained.history[tuned.trained.best_epoch - 1]["val_accuracy"])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_network_and_another_seed_another() -> None:
    trial = Trial(recipe(augmentation={"rotate_degrees": 10, "brightness": 0.1}))
    one, same, other = (trial.fine_tune(seed=seed).logits(trial.rows) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.slow
def test_what_is_exported_answers_as_keras_did(tmp_path: Path) -> None:
    trial = Trial(recipe(unfreeze="block2"))
    tuned = trial.fine_tune()
    model = backbones.build_backbone(trial.recipe.backbone, "block3", 32, tuned.network())
    exported = export(model, 2, trial.pixels)
    assert exported.largest_relative_difference < 1e-4
    place = tmp_path / "network.onnx"
    place.write_bytes(exported.onnx)
    engine = OpenVinoEngine(place, Precision.FLOAT32, 2)
    served = heads.logits(tuned.layers, engine.features(trial.pixels))
    assert served == pytest.approx(tuned.logits(trial.rows), rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [BackboneName.INCEPTION_V3, BackboneName.XCEPTION])
def test_a_network_with_branches_is_fine_tuned_from_its_last_block(name: BackboneName) -> None:
    trial = Trial(recipe(name.value, features_from=None, unfreeze=None))
    tuned = trial.fine_tune(trial.maps(), epochs=1)
    found = changed(trial.weights, tuned.network(), trial.recipe)
    assert any(found.values()) and not all(found.values())


@pytest.mark.slow
def test_a_network_that_diverges_leaves_a_fold_its_head_and_no_final_model() -> None:
    trial = Trial(recipe())
    broken = trial.data(np.full_like(trial.maps().inputs, np.nan, dtype=np.float32), are_maps=True)
    frozen = learners.HeadLearner(trial.recipe, trial.feature_data)
    learner = learners.FineTuningLearner(trial.recipe, frozen, trial.weights, broken)
    plan = replace(learner.plan, head=2)
    fold = LearningTask(trial.rows[trial.rows % 4 != 0], trial.rows[trial.rows % 4 == 0], plan, 0)
    heard = RecordingFitListener(0, None, lambda part, checkpoint: False)
    learned = learner.learn(fold, heard)
    head, network = learned.phases
    assert (learned.kept, learned.best_epoch) == ("head", head.best_epoch)
    assert (network.stopped, network.epochs, network.validation) == ("diverged", 0, None)
    assert len(learned.history) == head.epochs and np.isfinite(learned.logits(trial.rows)).all()
    with pytest.raises(TrainingDiverged, match=r"fine_tune\.learning_rate"):
        learner.learn(replace(fold, validation=NONE, is_final=True), heard)


def test_the_learning_rate_rises_and_falls() -> None:
    wanted = recipe(fine_tune={"learning_rate": 1e-3, "epochs": 10, "warmup_epochs": 2}).fine_tune
    assert wanted is not None
    schedule = fine_tuning.learning_rate_schedule(wanted, steps_per_epoch=5)
    rates = [float(schedule(step)) for step in range(51)]
    assert rates[0] == 0 and rates[10] == pytest.approx(1e-3) and rates[50] == pytest.approx(0, abs=1e-9)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
