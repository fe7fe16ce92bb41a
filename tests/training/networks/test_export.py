from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from exporting import Exports
from running import ROOT

from inference.engine import OpenVinoEngine
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.recipe import Precision
from training.networks import backbones

QUICK = [(BackboneName.VGG16, "block1")]
SLOW = [*((name, entry.last_cut) for name, entry in CATALOGUE.items()), (BackboneName.RESNET50, "conv2")]


@pytest.mark.parametrize(("name", "cut"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_an_exported_network_answers_as_keras_does_at_any_batch_size(
    exports: Exports, name: BackboneName, cut: str, tmp_path: Path
) -> None:
    result = exports.get(name, cut)
    assert result.width == CATALOGUE[name].cuts[cut]
    assert result.largest_relative_difference < 1e-4
    path = tmp_path / "network.onnx"
    path.write_bytes(result.onnx)
    engine = OpenVinoEngine(path, Precision.FLOAT32, threads=2)
    size = CATALOGUE[name].minimum_size
    model = backbones.build_backbone(name, cut, size, exports.weights(name).read_bytes())
    images = np.random.default_rng(7).integers(0, 256, (5, size, size, 3), dtype=np.uint8)
    expected = keras.ops.convert_to_numpy(model(images)["features"])
    together = engine.features(images)
    np.testing.assert_allclose(together, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    alone = np.concatenate([engine.features(images[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_network_cut_early_weighs_less(exports: Exports) -> None:
    whole = sum(weight.size for weight in backbones.build_network(BackboneName.VGG16, 32).get_weights())
    result = exports.get(BackboneName.VGG16, "block1")
    assert result.parameters == 38_720 < whole / 100
    assert len(result.onnx) < 200_000


@pytest.mark.slow
def test_exporting_takes_no_more_memory_than_a_small_machine_has() -> None:
    # VmHWM and not getrusage, which counts what the process that started this one had taken: the tests' own.
    program = """
from pathlib import Path
from training.networks import backbones, export
from recipes.catalogue import BackboneName
name = BackboneName.RESNET50
export.export(backbones.build_backbone(name, "conv5", 32, backbones.random_weights(name)), 2)
[peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(peak.split()[1])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 4 * 1024**3
