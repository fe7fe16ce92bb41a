"""The table of backbones, held against the source text of the Keras that trains with it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from recipes.catalogue import CATALOGUE, Backbone, BackboneName, Preprocessing

MODULES = {BackboneName.RESNET50: "resnet"}  # the others' modules have their names
TOPS = {"vgg16": 512, "vgg19": 512, "resnet50": 2048, "inception_v3": 2048, "xception": 2048}
ALL = pytest.mark.parametrize("backbone", CATALOGUE.values(), ids=list(CATALOGUE))


def source(backbone: Backbone) -> str:
    """Return the text of Keras' module for a backbone, read without importing Keras and all of TensorFlow."""
    keras = importlib.util.find_spec("keras")
    assert keras is not None and keras.submodule_search_locations is not None
    module = MODULES.get(backbone.name, backbone.name.value)
    return Path(keras.submodule_search_locations[0], "src", "applications", f"{module}.py").read_text()


def joined(text: str) -> str:
    """Return source text with string literals that follow each other made one."""
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_backbone_is_in_the_catalogue_under_its_name() -> None:
    assert set(CATALOGUE) == set(BackboneName)
    assert all(backbone.name == name for name, backbone in CATALOGUE.items())
    assert len({backbone.imagenet for backbone in CATALOGUE.values()}) == len(CATALOGUE)


@ALL
def test_the_sizes_are_those_of_keras(backbone: Backbone) -> None:
    text = source(backbone)
    assert re.findall(r"default_size=(\d+)", text) == [str(backbone.size)]
    assert re.findall(r"min_size=(\d+)", text) == [str(backbone.minimum_size)]
    assert backbone.minimum_size <= backbone.size


@ALL
def test_the_weights_are_those_that_keras_publishes(backbone: Backbone) -> None:
    text = joined(source(backbone))
    folder, file = backbone.imagenet.path.split("/")
    assert file == f"{backbone.name}_weights_tf_dim_ordering_tf_kernels_notop.h5"
    if backbone.name is BackboneName.RESNET50:
        assert f'/keras-applications/{folder}/"' in text
        assert "{weights_name}_weights_tf_dim_ordering_tf_kernels_notop.h5" in text
        found = re.search(r'"resnet50": \(\s*"[0-9a-f]{32}",\s*"([0-9a-f]{32})",?\s*\)', text)
    else:
        assert f"/keras-applications/{folder}/{file}" in text
        found = re.search(re.escape(f'"{file}",') + r'[^)]*file_hash="([0-9a-f]{32})"', text)
    assert found is not None and found[1] == backbone.imagenet.md5


@ALL
def test_the_preprocessing_is_that_of_keras(backbone: Backbone) -> None:
    modes = re.findall(r'x, data_format=data_format, mode="(\w+)"', source(backbone))
    assert [Preprocessing(mode) for mode in modes] == [backbone.preprocessing]


@ALL
def test_the_title_is_the_name_of_the_class_in_keras(backbone: Backbone) -> None:
    assert f'"keras.applications.{backbone.title}"' in source(backbone)


@ALL
def test_cuts_have_positive_widths_and_the_last_one_is_the_whole_network(backbone: Backbone) -> None:
    assert all(width > 0 for width in backbone.cuts.values())
    assert backbone.last_cut == list(backbone.cuts)[-1]
    assert backbone.cuts[backbone.last_cut] == TOPS[backbone.name]


def test_the_widths_of_inception_are_those_that_keras_notes() -> None:
    backbone = CATALOGUE[BackboneName.INCEPTION_V3]
    noted = re.findall(r"# mixed (\d+): \d+ x \d+ x (\d+)", source(backbone))
    assert noted, "the notes are still there"
    for number, width in noted:
        assert backbone.cuts[f"mixed{number}"] == int(width)


@pytest.mark.parametrize("name", [BackboneName.VGG16, BackboneName.VGG19])
def test_the_blocks_of_vgg_are_as_wide_as_in_keras(name: BackboneName) -> None:
    widths = re.findall(r'Conv2D\(\s*(\d+), \(3, 3\), activation="relu", padding="same", name="(block\d)_conv1"',
                        source(CATALOGUE[name]))  # fmt: skip
    assert {block: int(width) for width, block in widths} == dict(CATALOGUE[name].cuts)


def test_the_stages_of_resnet_are_as_wide_as_in_keras() -> None:
    backbone = CATALOGUE[BackboneName.RESNET50]
    body = source(backbone).split("def ResNet50(")[1].split("def ResNet101(")[0]
    stages = re.findall(r'stack_residual_blocks_v1\(\s*x, (\d+), \d+,.*?name="(conv\d)"', body, re.DOTALL)
    assert {name: 4 * int(filters) for filters, name in stages} == dict(backbone.cuts)


@pytest.mark.parametrize(
    ("unfreeze", "frozen"), [("all", None), ("block1", None), ("block2", "block1"), ("block5", "block4")]
)
def test_the_part_before_the_cut_stays_frozen(unfreeze: str, frozen: str | None) -> None:
    assert CATALOGUE[BackboneName.VGG16].cut_before(unfreeze) == frozen
