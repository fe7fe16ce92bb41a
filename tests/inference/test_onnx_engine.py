"""ONNX Runtime beside OpenVINO, on the processor: without a GPU, what is said to CUDA is all that can be seen of it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from running import ROOT

from artifacts.bundle import Bundle, Dense
from artifacts.features import Features
from artifacts.images import IMAGE_RULE, Pixels
from artifacts.store import Store
from errors import EngineMissing, PrecisionUnsupported
from inference import heads, onnx_engine
from inference.engine import TOLERANCE, Engine, OpenVinoEngine
from inference.engine_choice import choose_engine_loader
from inference.onnx_engine import CUDA, PROCESSOR, OnnxEngine, provider_options, runs_on
from inference.shelf import EngineLoader, Shelf
from recipes.catalogue import BackboneName
from recipes.layers import Activation
from recipes.recipe import Precision, Resize, Task
from training.networks import backbones
from training.networks.export import export
from training.networks.quantisation import quantise

SIZE = 32
IMAGES: Pixels = np.random.default_rng(11).integers(0, 256, (9, SIZE, SIZE, 3), dtype=np.uint8)
ENGINES: list[EngineLoader] = [OpenVinoEngine, OnnxEngine]


@pytest.fixture(scope="module", params=["block3", pytest.param("block5", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16 at 32 pixels with random weights, as a run exports it."""
    name = BackboneName.VGG16
    path: Path = tmp_path_factory.mktemp("network") / "network.onnx"
    model = backbones.build_backbone(name, request.param, SIZE, backbones.random_weights(name))
    path.write_bytes(export(model, threads=2).onnx)
    return path


def difference(found: Features | None, expected: Features | None) -> float:
    """Return the largest difference, relative to the largest value."""
    assert found is not None and expected is not None and found.shape == expected.shape
    assert found.dtype == expected.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_both_engines_answer_alike_at_any_batch_size(network: Path) -> None:
    engine, other = (load(network, Precision.FLOAT32, 2) for load in ENGINES)
    for count in (1, 9, 4):
        features, maps = engine.run(IMAGES[:count], wants_maps=True)
        expected, expected_maps = other.run(IMAGES[:count], wants_maps=True)
        assert difference(features, expected) < 1e-5 and difference(maps, expected_maps) < 1e-5
    features, maps = engine.run(IMAGES[:1], wants_maps=False)
    assert features.shape[0] == 1 and maps is None


def test_several_threads_may_ask_at_once(network: Path) -> None:
    engine = OnnxEngine(network, Precision.FLOAT32, 1)
    expected = engine.features(IMAGES)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: engine.features(IMAGES[number % 9 :][:1]), range(36)))
    for number, features in enumerate(found):
        assert difference(features, expected[number % 9 :][:1]) < 1e-5


@pytest.mark.parametrize("served_by", ENGINES)
def test_a_bundle_of_one_engine_is_served_by_the_other(network: Path, store: Store, served_by: EngineLoader) -> None:
    (trained_by,) = (load for load in ENGINES if load is not served_by)
    engine = trained_by(network, Precision.FLOAT32, 2)
    features = engine.features(IMAGES)
    # As a head that has learned: the features of some images in it, on a scale where it tells them apart.
    kernel = (features[:3] / np.square(features[:3]).sum(axis=1, keepdims=True)).T
    layers = (Dense(np.ascontiguousarray(kernel), np.zeros(3, np.float32), Activation.LINEAR),)
    bundle = Bundle(
        task=Task.MULTICLASS,
        labels=("a", "b", "c"),
        backbone=store.put(network.read_bytes()),
        engine=engine.name,
        precision=Precision.FLOAT32,
        image_rule=IMAGE_RULE,
        size=SIZE,
        resize=Resize.SQUASH,
        layers=layers,
        golden_input=IMAGES[:4],
        golden_output=heads.logits(layers, features[:4]),
    )
    shelf = Shelf(store, 2, 10**9, served_by)
    predictor = shelf.predictor(store.put(bundle.dump()))
    [loaded] = shelf.loaded()
    assert {loaded.batcher.engine, predictor.bundle.engine} == {"openvino", "onnxruntime"}
    found, expected = predictor.logits(IMAGES), heads.logits(layers, features)
    assert np.abs(found - expected).max() < TOLERANCE[Precision.FLOAT32] / 10
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()
    shelf.close()


def test_a_precision_that_it_would_not_keep_is_refused(network: Path) -> None:
    with pytest.raises(PrecisionUnsupported, match=r"float32 and int8.*bfloat16.*ESPALIER_ENGINE=openvino"):
        OnnxEngine(network, Precision.BFLOAT16, 1)


def test_a_quantised_network_is_the_same_in_both_engines(network: Path, tmp_path: Path) -> None:
    quantised = tmp_path / "quantised.onnx"
    quantised.write_bytes(quantise(network.read_bytes(), IMAGES, lambda done, total: None).onnx)
    expected = OnnxEngine(network, Precision.FLOAT32, 2).features(IMAGES)
    found, other = (load(quantised, Precision.INT8, 2).features(IMAGES) for load in (OnnxEngine, OpenVinoEngine))
    assert 0 < difference(found, expected) < 0.1
    assert difference(found, other) < TOLERANCE[Precision.INT8] / 2


def test_a_batch_that_there_is_no_room_for_is_told(network: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
import numpy as np
from recipes.recipe import Precision
from errors import OutOfMemory
from inference.onnx_engine import OnnxEngine
engine = OnnxEngine(Path(sys.argv[1]), Precision.FLOAT32, 1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28,) * 2)
try:
    engine.features(np.zeros((2048, 32, 32, 3), np.uint8))
except OutOfMemory as error:
    print(error.detail)
print(engine.features(np.zeros((1, 32, 32, 3), np.uint8)).shape[0])
"""
    command = [sys.executable, "-c", program, str(network)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    told, goes_on = done.stdout.splitlines()
    assert told.startswith("Not enough memory on this machine for a batch of 2048 images.") and goes_on == "1"


# --- what is said to CUDA, and who is chosen --------------------------------------------------------------------------


def test_a_gpu_computes_in_float32_and_what_it_cannot_goes_to_the_processor() -> None:
    (first, options), (second, none) = provider_options(has_cuda=True)
    assert (first, second, none) == (CUDA, PROCESSOR, {})
    assert options["use_tf32"] == "0" and options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert provider_options(has_cuda=False) == [(PROCESSOR, {})]


def test_a_device_is_tried_with_an_addition() -> None:
    two = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "addition", two[:1], two[1:])
    written = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert written.SerializeToString() == onnx_engine._ADDITION
    assert runs_on(PROCESSOR, provider_options(has_cuda=False))
    assert not runs_on(CUDA, provider_options(has_cuda=False))


def test_the_engine_that_is_asked_for_is_chosen_and_a_gpu_by_itself() -> None:
    assert choose_engine_loader("openvino") is OpenVinoEngine
    assert choose_engine_loader("onnxruntime") is OnnxEngine
    by_itself: type[Engine] = OnnxEngine if onnx_engine.finds_cuda() else OpenVinoEngine
    assert choose_engine_loader("auto") is by_itself


def test_an_api_without_onnxruntime_starts_unless_it_is_asked_for(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["onnxruntime"] = None
import api.app
from settings import Settings
api.app.create_app(Settings())
print("started")
api.app.create_app(Settings(engine="onnxruntime"))
"""
    command = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": str(ROOT), "ESPALIER_VAR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "started\n" and done.returncode == 1
    assert EngineMissing.__name__ in done.stderr and "onnxruntime-gpu" in done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "from inference.engine_choice import choose_engine_loader; choose_engine_loader('auto')",
        "from training.networks.quantisation import _nncf; _nncf(); import nncf.onnx.engine",
    ],
)
def test_nothing_reports_home(tmp_path: Path, imports: str) -> None:
    """What would be sent lies in the temporary folder first, under an identity that is made up there."""
    surroundings = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    code = f"{imports}; import sys; assert 'onnxruntime' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=surroundings | {"TMPDIR": str(tmp_path)}, check=True)
    assert list(tmp_path.iterdir()) == []
