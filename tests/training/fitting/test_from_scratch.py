"""Networks from scratch: against textbooks, against Keras, and as whole runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import sample
from experiments import ExperimentRunner
from exporting import Exports
from PIL import Image
from pydantic import TypeAdapter

from artifacts import bundle as bundles
from artifacts.bundle import Bundle
from artifacts.images import decode
from artifacts.manifest import Row
from inference import heads
from inference.engine import OpenVinoEngine
from inference.layer_maps import LayerReader
from recipes.defaults import ClassCount, fill
from recipes.layers import Layer, NetworkRecipe
from recipes.recipe import Recipe, Task
from recipes.shapes import filled_network
from training.fitting.fit_task import FitData, FitTask, FittedNetwork
from training.fitting.from_scratch import fit_from_scratch
from training.fitting.training_loop import FitHooks
from training.networks import backbones, scratch_networks
from training.networks.export import export
from training.networks.stochastic_pooling import StochasticPooling
from training.progress import Epoch

SILENT = FitHooks(lambda number, epoch: None)
# The four pictures of two pixels, in black and white.
BITS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
PIXELS = np.repeat(BITS[:, None, :, None] * 255, 3, axis=3).astype(np.uint8)
INPUTS = 2.0 * BITS - 1.0  # as a network sees black and white
AND, OR, XOR = np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0])
ALL, NONE = np.arange(4), np.array([], dtype=np.intp)


def filled(task: Task = Task.BINARY, **recipe: Any) -> Recipe:
    counts = [] if task is Task.REGRESSION else [ClassCount("no", 99, 99), ClassCount("yes", 99, 99)]
    return fill(Recipe.model_validate({"mode": "from-scratch"} | recipe), task, counts, groups=99)


def perceptron(threshold: str, **recipe: Any) -> Recipe:
    network = {"kind": "perceptron", "channels": 1, "threshold": threshold}
    rate = {"name": "sgd", "learning_rate": 0.1}
    return filled(network=network, image_size=[1, 2], optimizer=rate, early_stopping=None, **recipe)


def learn(
    recipe: Recipe, truth: Any, epochs: int, seed: int = 0, pixels: Any = PIXELS, task: Task = Task.BINARY
) -> FittedNetwork:
    rows = np.arange(len(pixels))
    return fit_from_scratch(recipe, FitData(task, 1, pixels, truth), FitTask(rows, NONE, epochs, seed, SILENT))


def order_of(rows: int, epochs: int, seed: int = 0) -> list[int]:
    """Return the order in which images are seen; Keras has looked into that of epoch 0 before it begins."""
    seen = [np.random.default_rng((seed, epoch)).permutation(np.arange(rows)) for epoch in range(1, epochs + 1)]
    return [int(row) for epoch in seen for row in epoch]


# --- against textbooks ------------------------------------------------------------------------------------------------


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize("threshold", ["step", "sigmoid"])
def test_a_perceptron_learns_by_the_delta_rule(threshold: str) -> None:
    """Greys at random: with black and white alone, rounding would decide on which side of a step zero lies."""
    random = np.random.default_rng(1)
    greys, truth = random.integers(0, 256, (6, 1, 2, 1), dtype=np.uint8), random.permutation([0, 0, 0, 1, 1, 1])
    grown = learn(perceptron(threshold), truth, epochs=5, pixels=np.repeat(greys, 3, axis=3))
    inputs = greys.reshape(6, 2) / 127.5 - 1
    w, b = np.zeros(2), 0.0
    for row in order_of(6, epochs=5):
        z = w @ inputs[row] + b
        output = float(z >= 0) if threshold == "step" else sigmoid(z)
        error = truth[row] - output
        w, b = w + 0.1 * error * inputs[row], b + 0.1 * error
    assert grown.layers[0].kernel[:, 0] == pytest.approx(w, abs=1e-6)
    assert grown.layers[0].bias[0] == pytest.approx(b, abs=1e-6)


def test_the_delta_rule_with_the_slope_of_the_sigmoid() -> None:
    grown = learn(perceptron("sigmoid", loss="mean_squared_error"), OR, epochs=5)
    w, b = np.zeros(2), 0.0
    for row in order_of(4, epochs=5):
        output = sigmoid(w @ INPUTS[row] + b)
        step = 0.1 * (OR[row] - output) * output * (1 - output)
        w, b = w + step * INPUTS[row], b + step
    assert grown.layers[0].kernel[:, 0] == pytest.approx(w, abs=1e-6)
    assert grown.layers[0].bias[0] == pytest.approx(b, abs=1e-6)


def test_of_several_classes_each_output_learns_by_itself() -> None:
    classes = np.array([0, 1, 2, 1])
    network = {"kind": "perceptron", "channels": 1}
    counts = [ClassCount(name, 9, 9) for name in "abc"]
    wanted = {"mode": "from-scratch", "network": network, "image_size": [1, 2], "early_stopping": None}
    recipe = fill(Recipe.model_validate(wanted), Task.MULTICLASS, counts)
    grown = fit_from_scratch(recipe, FitData(Task.MULTICLASS, 3, PIXELS, classes), FitTask(ALL, NONE, 3, 0, SILENT))
    w, b = np.zeros((2, 3)), np.zeros(3)
    for row in order_of(4, epochs=3):
        error = np.eye(3)[classes[row]] - sigmoid(INPUTS[row] @ w + b)
        w, b = w + 0.01 * np.outer(INPUTS[row], error), b + 0.01 * error
    assert grown.layers[0].kernel == pytest.approx(w, abs=1e-6)
    assert grown.layers[0].bias == pytest.approx(b, abs=1e-6)


def test_a_perceptron_of_numbers_is_linear() -> None:
    numbers = np.array([[1.0], [2.0], [4.0], [3.0]])
    recipe = filled(
        Task.REGRESSION, network={"kind": "perceptron", "channels": 1}, image_size=[1, 2], early_stopping=None
    )
    grown = learn(recipe, numbers, epochs=4, task=Task.REGRESSION)
    mean, deviation = numbers.mean(), numbers.std()
    w, b = np.zeros(2), 0.0
    for row in order_of(4, epochs=4):
        error = (numbers[row, 0] - mean) / deviation - (w @ INPUTS[row] + b)
        w, b = w + 0.01 * error * INPUTS[row], b + 0.01 * error
    assert grown.layers[0].kernel[:, 0] == pytest.approx(w, abs=1e-5)
    assert grown.layers[0].bias[0] == pytest.approx(b, abs=1e-5)
    assert grown.logits(ALL)[:, 0] == pytest.approx((INPUTS @ w + b) * deviation + mean, abs=1e-5)


@pytest.mark.parametrize(
    ("threshold", "truth", "is_learned"), [("step", AND, True), ("sigmoid", OR, True), ("step", XOR, False)]
)
def test_a_perceptron_learns_and_and_or_but_not_xor(threshold: str, truth: Any, is_learned: bool) -> None:
    grown = learn(perceptron(threshold), truth, epochs=20)
    assert (np.array_equal(grown.logits(ALL)[:, 0] >= 0, truth == 1)) is is_learned


@pytest.mark.parametrize(
    ("activation", "loss"),
    [("sigmoid", "auto"), ("tanh", "mean_squared_error"), ("relu", "auto"), ("linear", "mean_squared_error")],
)
def test_layers_learn_by_back_propagation(activation: str, loss: str) -> None:
    """Rumelhart, Hinton & Williams 1986: an error goes back through a layer's weights, times the slope before it."""
    network = {"kind": "mlp", "channels": 1, "layers": [{"type": "dense", "units": 3, "activation": activation}]}
    sgd = {"name": "sgd", "learning_rate": 0.5}
    recipe = filled(network=network, image_size=[1, 2], optimizer=sgd, batch_size=2, early_stopping=None, loss=loss)
    before = learn(recipe, XOR, epochs=0, seed=3)
    (w1, b1), (w2, b2) = (
        _hidden(recipe, before),
        (before.layers[0].kernel.astype(float), before.layers[0].bias.astype(float)),
    )
    functions: dict[str, tuple[Any, Any]] = {
        "sigmoid": (sigmoid, lambda y: y * (1 - y)),
        "tanh": (np.tanh, lambda y: 1 - y**2),
        "relu": (lambda z: np.maximum(z, 0), lambda y: (y > 0).astype(float)),
        "linear": (lambda z: z, np.ones_like),
    }
    f, slope = functions[activation]
    seen = order_of(4, epochs=3, seed=3)
    for start in range(0, len(seen), 2):
        rows = seen[start : start + 2]
        x, t = INPUTS[rows].astype(float), XOR[rows, None]
        hidden = f(x @ w1 + b1)
        y = sigmoid(hidden @ w2 + b2)
        delta = (y - t) / len(rows) * (2 * y * (1 - y) if loss == "mean_squared_error" else 1)
        back = delta @ w2.T * slope(hidden)
        w2, b2 = w2 - 0.5 * hidden.T @ delta, b2 - 0.5 * delta.sum(axis=0)
        w1, b1 = w1 - 0.5 * x.T @ back, b1 - 0.5 * back.sum(axis=0)
    after = learn(recipe, XOR, epochs=3, seed=3)
    kernel, bias = _hidden(recipe, after)
    for found, expected in ((kernel, w1), (bias, b1), (after.layers[0].kernel, w2), (after.layers[0].bias, b2)):
        assert found == pytest.approx(expected, abs=1e-6)


def _hidden(recipe: Recipe, grown: FittedNetwork) -> tuple[Any, Any]:
    """Return kernel and bias of the one hidden layer."""
    assert recipe.network is not None and recipe.image_size is not None
    model = scratch_networks.build_feature_network(recipe.network, recipe.image_size, grown.network())
    kernel, bias = (np.asarray(weights, float) for weights in model.get_weights())
    return kernel, bias


# --- stochastic pooling -----------------------------------------------------------------------------------------------


def test_stochastic_pooling_draws_with_its_probabilities() -> None:
    window = np.array([[1.0, 2.0], [0.0, -3.0]], np.float32)
    draws = 20_000
    maps = np.tile(window[None, :, :, None], (draws, 1, 1, 1))
    keras.utils.set_random_seed(0)
    pooled = np.asarray(StochasticPooling((2, 2), (2, 2), "valid")(maps, training=True)).ravel()
    assert set(pooled) == {1.0, 2.0}
    expected, deviation = 2 / 3, np.sqrt(2 / 9 / draws)
    assert abs((pooled == 2).mean() - expected) < 5 * deviation
    answer = np.asarray(StochasticPooling((2, 2), (2, 2), "valid")(maps[:1], training=False)).item()
    assert answer == pytest.approx(1 / 3 * 1 + 2 / 3 * 2)


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [((2, 2), (2, 2), "same"), ((3, 3), (2, 2), "valid"), ((3, 2), (1, 3), "same"), ((1, 1), (2, 2), "valid")],
)
def test_stochastic_pooling_has_the_windows_of_keras(size: Any, stride: Any, padding: str) -> None:
    """With one value other than zero in reach, the mean weighted by size is the largest value."""
    maps = np.zeros((3, 7, 9, 2), np.float32)
    maps[0, 3, 4, 0] = maps[1, 6, 8, 1] = maps[2, 0, 0, 0] = 5.0
    ours = StochasticPooling(size, stride, padding)
    theirs = np.asarray(keras.layers.MaxPooling2D(size, stride, padding)(maps))
    assert np.asarray(ours(maps)) == pytest.approx(theirs)
    assert np.asarray(ours(maps, training=True)) == pytest.approx(theirs)
    assert ours.compute_output_shape(maps.shape) == theirs.shape


# --- as it is served --------------------------------------------------------------------------------------------------

_LAYERS: TypeAdapter[tuple[Layer, ...]] = TypeAdapter(tuple[Layer, ...])
EVERY_LAYER = [
    {"type": "convolution", "filters": 6, "kernel": [3, 2], "activation": "tanh", "name": "low"},
    {"type": "batch_normalization"},
    {"type": "pooling", "kind": "stochastic", "size": 3, "stride": 2, "padding": "same"},
    {"type": "convolution", "filters": 6, "padding": "same", "stride": 2, "name": "left"},
    {"type": "convolution", "filters": 6, "kernel": 1, "stride": 2, "inputs": ["pooling_1"], "name": "right"},
    {"type": "add", "inputs": ["left", "right"], "activation": "relu"},
    {"type": "concatenate", "inputs": ["add_1", "left"]},
    {"type": "pooling", "kind": "average"},
    {"type": "pooling", "size": [1, 2], "stride": 1},
    {"type": "dropout", "rate": 0.3},
    {"type": "flatten"},
    {"type": "dense", "units": 8, "activation": "sigmoid"},
]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_every_layer_is_exported_as_keras_has_it(channels: int, tmp_path: Path) -> None:
    network = filled_network(NetworkRecipe(layers=_LAYERS.validate_python(EVERY_LAYER), channels=channels), 24, 20)
    keras.utils.set_random_seed(1)
    weights = backbones.dump_weights(scratch_networks.build_body(network, (24, 20)))
    model = scratch_networks.build_feature_network(network, (24, 20), weights)
    exported = export(model, threads=2)
    assert exported.width == 8 and exported.largest_relative_difference < 1e-5


_AVERAGED = [{"type": "global_average"}, {"type": "dropout"}]


def test_what_each_layer_sees_is_what_keras_computes(tmp_path: Path) -> None:
    network = filled_network(NetworkRecipe(layers=_LAYERS.validate_python(EVERY_LAYER)), 24, 20)
    body = scratch_networks.build_body(network, (24, 20))
    for layer in body.layers:  # so that BatchNorm changes something
        layer.set_weights([np.random.default_rng(2).uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    path = tmp_path / "network.onnx"
    path.write_bytes(
        export(scratch_networks.build_feature_network(network, (24, 20), backbones.dump_weights(body)), threads=2).onnx
    )
    insight = LayerReader(path, 2)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    seen = {layer.name: insight.maps(pixels, layer.name) for layer in insight.layers}
    assert {"pooling_1", "pooling_2", "pooling_3", "right", "add_1", "concatenate_1"} <= set(seen)
    for name, maps in seen.items():
        by_keras = keras.Model(body.input, body.get_layer(name).output)(scratch_networks.scale_pixels(pixels[None], 3))
        assert maps == pytest.approx(keras.ops.convert_to_numpy(by_keras)[0], abs=1e-4), name


def test_a_layer_may_have_any_name() -> None:
    names = ["maps", "body", "images", "features"]
    layers = [{"type": "convolution", "filters": 2, "name": names[0]}, {"type": "pooling", "name": names[1]}]
    layers += [{"type": "flatten", "name": names[2]}, {"type": "dense", "units": 3, "name": names[3]}]
    network = filled_network(NetworkRecipe(layers=_LAYERS.validate_python(layers)), 8, 8)
    model = scratch_networks.build_feature_network(
        network, 8, backbones.dump_weights(scratch_networks.build_body(network, 8))
    )
    assert model(np.zeros((1, 8, 8, 3), np.uint8))["features"].shape == (1, 3)


def test_features_are_the_mean_of_the_maps_before_the_last_global_average() -> None:
    layers = _LAYERS.validate_python([{"type": "convolution", "filters": 256, "stride": 8}, *_AVERAGED])
    network = filled_network(NetworkRecipe(layers=layers), 32, 32)
    body = scratch_networks.build_body(network, 32)
    model = scratch_networks.build_feature_network(network, 32, backbones.dump_weights(body))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    answer = model(images)
    maps = np.asarray(answer["maps"])
    assert maps.shape == (2, 4, 4, 256)
    assert np.asarray(answer["features"]) == pytest.approx(maps.mean(axis=(1, 2)), abs=1e-5)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path, exports: Exports) -> ExperimentRunner:
    return ExperimentRunner(tmp_path, exports)


def pictures(bench: ExperimentRunner, truth: Any, copies: int) -> list[Row]:
    """Return rows of pictures of two pixels; in a data set equal ones would belong together."""
    files = {}
    for number in range(copies):
        for pixels, yes in zip(PIXELS, truth, strict=True):
            buffer = io.BytesIO()
            shade = np.where(pixels > 0, 255 - number, number).astype(np.uint8)  # each file differs from the others
            Image.fromarray(shade).save(buffer, "PNG")
            files[f"{'yes' if yes else 'no'}/{number}-{shade[0, 0, 0]}-{shade[0, 1, 0]}.png"] = buffer.getvalue()
    return bench.rows(files)


def served(bench: ExperimentRunner, bundle: Bundle, files: list[bytes], limits: Any) -> Any:
    engine = OpenVinoEngine(bench.store.path(bundle.backbone), bundle.precision, 2)
    seen = np.stack([decode(file, bundle.size, bundle.resize, limits) for file in files])
    return heads.logits(bundle.layers, engine.features(seen))


@pytest.mark.slow
def test_two_hidden_units_learn_xor_of_pictures_of_two_pixels(bench: ExperimentRunner) -> None:
    rows = pictures(bench, XOR, copies=6)
    outcome, heard = bench.run(
        rows,
        mode="from-scratch",
        network={"kind": "mlp", "channels": 1, "layers": [{"type": "dense", "units": 2, "activation": "tanh"}]},
        image_size=[1, 2],
        optimizer={"name": "adam", "learning_rate": 0.1},
        batch_size=4,
        epochs=60,
        early_stopping=None,
        folds={"k": 2},
        seed=4,  # with two hidden units, every second start ends in a local minimum
    )
    assert heard.stages == ["pixels", "folds", "final", "export", "bundle"]
    assert outcome.metrics["accuracy"] == 1.0
    bundle = bundles.load(bench.store.read(outcome.bundle))
    assert bundle.size == (1, 2)
    files = [bench.store.read(row.sha256) for row in rows]
    answers = served(bench, bundle, files, bench.place.image_limits)[:, 0] > 0
    assert [bundle.labels[int(answer)] for answer in answers] == [row.labels[0] for row in rows]


def test_a_perceptron_cannot_learn_xor_of_pictures(bench: ExperimentRunner) -> None:
    outcome, _ = bench.run(
        pictures(bench, XOR, copies=6),
        mode="from-scratch",
        network={"kind": "perceptron", "channels": 1, "threshold": "step"},
        image_size=[1, 2],
        epochs=10,
        folds={"k": 2},
    )
    assert outcome.metrics["accuracy"] < 0.8
    assert "delta rule" in outcome.files["report.md"][0].decode()


CNN = {
    "mode": "from-scratch",
    "image_size": 16,
    "epochs": 3,
    "folds": {"k": 2},
    "optimizer": {"learning_rate": 0.01},
    "network": {
        "layers": [
            {"type": "convolution", "filters": 8, "padding": "same"},
            {"type": "batch_normalization"},
            {"type": "pooling", "kind": "stochastic"},
            {"type": "dropout", "rate": 0.1},
            {"type": "global_average"},
        ]
    },
}


@pytest.mark.slow
def test_a_cnn_goes_on_from_where_it_was_cut_off(bench: ExperimentRunner) -> None:
    """What BatchNorm counts and what pooling and dropout draw goes on, too."""
    rows = bench.rows(sample.coloured(per_class=10))
    change = CNN | {"augmentation": {"rotate_degrees": 20, "brightness": 0.1}}
    whole, heard = bench.run(rows, **change)
    again = bench.run_with_cuts(rows, {(0, "head", 1), (None, "head", 1)}, **change)
    assert "augmentations.png" in heard.files
    assert again.metrics["loss"] == whole.metrics["loss"]
    ends = [bundles.load(bench.store.read(outcome.bundle)).golden_output for outcome in (whole, again)]
    assert np.array_equal(*ends)


def test_what_is_served_answers_as_keras_does(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=10))
    outcome, heard = bench.run(rows, **CNN, neighbours=True)
    assert outcome.metrics["export"]["largest_relative_difference"] < 1e-4
    assert "CNN" in outcome.files["report.md"][0].decode()
    assert "neighbours.safetensors" in outcome.files
    assert {name for epoch in heard.folds[0].history for name in epoch} == {
        "loss",
        "accuracy",
        "val_loss",
        "val_accuracy",
    }


@pytest.mark.slow
def test_a_cnn_is_served_in_int8_if_that_is_as_good(bench: ExperimentRunner) -> None:
    rows = bench.rows(sample.coloured(per_class=10))
    outcome, _ = bench.run(rows, **CNN | {"epochs": 1}, precision="int8")
    tried = {one["precision"]: one["score"] for one in outcome.metrics["precision"]["tried"]}
    assert tried.keys() == {"float32", "int8"}
    outcome, _ = bench.run(rows, **CNN | {"network": {"kind": "mlp"}, "epochs": 1}, precision="int8")
    assert {one["precision"] for one in outcome.metrics["precision"]["tried"]} == {"float32", "int8"}


@pytest.mark.slow
def test_a_network_learns_tags_and_numbers(bench: ExperimentRunner) -> None:
    files = sample.coloured(per_class=8)
    singles = bench.rows(files)
    tagged = [Row(row.path, row.sha256, (*row.labels, "any"), None, None, row.split) for row in singles]
    change = CNN | {"epochs": 1}
    outcome, _ = bench.run(tagged, **change, loss="mean_squared_error")
    assert outcome.metrics["f1_micro"] > 0
    numbered = [Row(row.path, row.sha256, (), float(place % 5), None, row.split) for place, row in enumerate(singles)]
    outcome, _ = bench.run(numbered, **change)
    assert "rmse" in outcome.metrics


def test_epochs_are_told(bench: ExperimentRunner) -> None:
    told: list[tuple[int, Epoch]] = []
    hooks = FitHooks(lambda number, epoch: told.append((number, epoch)))
    fit_from_scratch(perceptron("sigmoid"), FitData(Task.BINARY, 1, PIXELS, AND), FitTask(ALL, NONE, 3, 0, hooks))
    assert [number for number, _ in told] == [1, 2, 3] and told[-1][1]["loss"] < told[0][1]["loss"]
