from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exporting import Exports

from artifacts.images import Pixels
from errors import PrecisionUnsupported
from inference.engine import TOLERANCE, OpenVinoEngine
from recipes.catalogue import BackboneName
from recipes.recipe import Precision
from training.networks.network_files import calibration_rows
from training.networks.quantisation import CALIBRATED_ON, calibration_size, quantise

SIZE = 32


@pytest.fixture(scope="module")
def network(exports: Exports) -> bytes:
    return exports.get(BackboneName.VGG16, "block2").onnx


@pytest.fixture(scope="module")
def images() -> Pixels:
    """Smooth images, as photographs are: noise alone would look the same to every channel."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (24, 2, 2, 3)).astype(np.float64)
    spots = np.kron(colours, np.ones((1, SIZE // 2, SIZE // 2, 1)))
    return (spots + rng.normal(0, 8, spots.shape)).clip(0, 255).astype(np.uint8)


def engine(folder: Path, network: bytes, precision: Precision) -> OpenVinoEngine:
    path = folder / f"{precision}.onnx"
    path.write_bytes(network)
    return OpenVinoEngine(path, precision, 2)


def test_a_quantised_network_is_a_quarter_as_large_and_nearly_the_same(
    tmp_path: Path, network: bytes, images: Pixels
) -> None:
    told: list[tuple[int, int]] = []
    made = quantise(network, images[:16], lambda done, total: told.append((done, total)))
    assert made.images == 16 and made.made_with.startswith("nncf ")
    assert made.facts() == {"images": 16, "made_with": made.made_with}
    assert len(made.onnx) < 0.3 * len(network)
    assert {total for _, total in told} == {16} and max(done for done, _ in told) == 16

    exact = engine(tmp_path, network, Precision.FLOAT32)
    coarse = engine(tmp_path, made.onnx, Precision.INT8)
    unseen = images[16:]
    expected, found = exact.features(unseen), coarse.features(unseen)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() / np.abs(expected).max() < 0.1
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    assert coarse.maps(unseen).mean(axis=(1, 2)) == pytest.approx(found, abs=5e-3 * float(found.max()))


def test_calibration_takes_the_bounds_of_its_images(network: bytes, images: Pixels) -> None:
    def made(pixels: Pixels) -> bytes:
        return quantise(network, pixels, lambda done, total: None).onnx

    dark = made(images[:8] // 8)
    assert made(images[:8] // 8) == dark
    assert made(images[:8]) != dark


def test_large_images_are_calibrated_on_fewer_and_a_sample_is_always_the_same() -> None:
    assert calibration_size(224) == CALIBRATED_ON == 300
    assert calibration_size(1024) == 85
    rows = np.arange(10, 2000)
    drawn = calibration_rows(rows, 224)
    assert len(drawn) == 300 and len(set(drawn)) == 300 and set(drawn) <= set(rows)
    assert np.array_equal(drawn, np.sort(drawn)) and np.array_equal(drawn, calibration_rows(rows, 224))
    assert np.array_equal(calibration_rows(rows[:5], 224), rows[:5])


def test_bfloat16_answers_nearly_the_same_or_is_refused_by_a_processor_without_it(
    tmp_path: Path, network: bytes, images: Pixels
) -> None:
    exact = engine(tmp_path, network, Precision.FLOAT32).features(images)
    if Precision.BFLOAT16 in OpenVinoEngine.precisions():
        found = engine(tmp_path, network, Precision.BFLOAT16).features(images)
        assert 0 < np.abs(found - exact).max() / np.abs(exact).max() < TOLERANCE[Precision.BFLOAT16]
    else:
        with pytest.raises(PrecisionUnsupported, match="no bfloat16 arithmetic"):
            engine(tmp_path, network, Precision.BFLOAT16)


def test_a_processor_without_bfloat16_is_told_so(
    tmp_path: Path, network: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openvino.Core.get_property", lambda core, device, name: ["FP32", "INT8"])
    assert OpenVinoEngine.precisions() == [Precision.FLOAT32, Precision.INT8]
    with pytest.raises(PrecisionUnsupported, match="train with float32, int8 or auto"):
        engine(tmp_path, network, Precision.BFLOAT16)
