"""Bundle formats 1 and 2: a written bundle can be read, and an invalid one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from artifacts.bundle import Bundle, Dense, Unit, load
from artifacts.store import digest_of
from errors import BundleRefused
from recipes.layers import Activation
from recipes.recipe import Precision, Resize, Task

Tensors = dict[str, npt.NDArray[Any]]
Manifest = dict[str, Any]


def make(
    seed: int = 0,
    task: Task = Task.MULTICLASS,
    units: tuple[int, ...] = (6, 4, 3),
    size: int = 4,
    images: int = 2,
    labels: tuple[str, ...] = ("daisy", "rose", "tulip"),
    **others: Any,
) -> Bundle:
    """Return a bundle whose head has layers with these numbers of units; the first number is that of the features."""
    source = np.random.default_rng(seed)
    inputs, outputs = units[:-1], units[1:]
    layers = tuple(
        Dense(
            source.normal(size=(before, after)).astype(np.float32),
            source.normal(size=after).astype(np.float32),
            Activation.LINEAR if number == len(inputs) - 1 else Activation.RELU,
        )
        for number, (before, after) in enumerate(zip(inputs, outputs, strict=True))
    )
    values: dict[str, Any] = {
        "task": task,
        "labels": labels,
        "backbone": digest_of(b"a backbone"),
        "engine": "openvino",
        "precision": Precision.FLOAT32,
        "image_rule": 1,
        "size": size,
        "resize": Resize.CROP,
        "layers": layers,
        "golden_input": source.integers(0, 256, (images, size, size, 3), dtype=np.uint8),
        "golden_output": source.normal(size=(images, units[-1])).astype(np.float32),
    }
    return Bundle(**{**values, **others})


BUNDLE = make()


def same(one: Bundle, other: Bundle) -> bool:
    """Return whether two bundles are equal, bit by bit."""
    arrays = [
        [
            bundle.golden_input,
            bundle.golden_output,
            *(part for layer in bundle.layers for part in (layer.kernel, layer.bias)),
            *(part for layer in bundle.layers if layer.unit for part in (layer.unit.mean, layer.unit.scale)),
        ]
        for bundle in (one, other)
    ]
    plain = {field.name for field in fields(Bundle)} - {"layers", "golden_input", "golden_output"}
    return (
        all(getattr(one, name) == getattr(other, name) for name in plain)
        and [layer.activation for layer in one.layers] == [layer.activation for layer in other.layers]
        and len(arrays[0]) == len(arrays[1])
        and all(
            (mine.dtype, mine.shape, mine.tobytes()) == (yours.dtype, yours.shape, yours.tobytes())
            for mine, yours in zip(*arrays, strict=True)
        )
    )


def parts(data: bytes) -> tuple[Manifest, Tensors]:
    """Parse a bundle's file as the specification of safetensors says."""
    length = int.from_bytes(data[:8], "little")
    manifest: Manifest = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["espalier"])
    return manifest, load_tensors(data)


def joined(manifest: Any, tensors: Tensors) -> bytes:
    return save_tensors(tensors, metadata={"espalier": json.dumps(manifest)})


def changed(change: Callable[[Manifest, Tensors], Any], bundle: Bundle = BUNDLE) -> bytes:
    """Return the file of a bundle after a change to its manifest or tensors."""
    manifest, tensors = parts(bundle.dump())
    change(manifest, tensors)
    return joined(manifest, tensors)


# --- there and back --------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    task = draw(st.sampled_from([Task.MULTICLASS, Task.MULTILABEL, Task.BINARY, Task.REGRESSION]))
    few = {Task.BINARY: (2, 2), Task.REGRESSION: (0, 0)}.get(task, (1, 6))
    labels = tuple(draw(st.lists(names, min_size=few[0], max_size=few[1])))
    outputs = 1 if task in (Task.BINARY, Task.REGRESSION) else len(labels)
    return make(
        seed=draw(st.integers(0, 1000)),
        task=task,
        units=(draw(st.integers(1, 9)), *draw(st.lists(st.integers(1, 5), max_size=2)), outputs),
        size=draw(st.integers(1, 6)),
        images=draw(st.integers(1, 3)),
        labels=labels,
        engine=draw(names),
        image_rule=draw(st.integers(0, 9)),
        resize=draw(st.sampled_from(Resize)),
        temperature=draw(st.floats(0.01, 100)),
        threshold=draw(st.floats(0, 1)),
        bit_depth=draw(st.sampled_from([10, 12, 14, 16])),
    )


@settings(max_examples=100, deadline=None)
@given(bundles())
def test_a_bundle_comes_back_as_it_was(bundle: Bundle) -> None:
    data = bundle.dump()
    again = load(data)
    assert same(again, bundle)
    assert again.dump() == data


def test_equal_bundles_give_equal_bytes() -> None:
    assert make().dump() == make().dump()
    strided = tuple(replace(layer, kernel=np.asfortranarray(layer.kernel)) for layer in BUNDLE.layers)
    assert not strided[0].kernel.flags.c_contiguous
    assert replace(BUNDLE, layers=strided).dump() == BUNDLE.dump()
    assert same(load(replace(BUNDLE, layers=strided).dump()), BUNDLE)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ("rose", "daisy", "tulip")},
        {"backbone": digest_of(b"another backbone")},
        {"engine": "onnx"},
        {"image_rule": 2},
        {"resize": Resize.PAD},
        {"temperature": 1.5},
        {"threshold": 0.4},
        {"neighbours": digest_of(b"neighbours")},
        {"bit_depth": 12},
        {"task": Task.MULTILABEL},
        {"golden_output": BUNDLE.golden_output + 1},
    ],
)
def test_bundles_that_differ_give_other_bytes(change: dict[str, Any]) -> None:
    assert replace(BUNDLE, **change).dump() != BUNDLE.dump()


def test_labels_keep_their_order_and_their_letters() -> None:
    labels = ("rosé", "Löwe", "雏菊\u2028")
    assert load(make(labels=labels).dump()).labels == labels
    assert "rosé".encode() in make(labels=labels).dump(), "people look into files"


def test_the_file_is_plain_safetensors_with_a_manifest() -> None:
    manifest, tensors = parts(BUNDLE.dump())
    assert manifest == {
        "format": 1,
        "task": "multiclass",
        "labels": ["daisy", "rose", "tulip"],
        "backbone": digest_of(b"a backbone"),
        "engine": "openvino",
        "precision": "float32",
        "image_rule": 1,
        "size": 4,
        "resize": "crop",
        "layers": [{"type": "dense", "activation": "relu"}, {"type": "dense", "activation": "linear"}],
        "temperature": 1.0,
        "threshold": 0.5,
    }
    assert {name: (str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()} == {
        "golden_input": ("uint8", (2, 4, 4, 3)),
        "golden_output": ("float32", (2, 3)),
        "layers.0.kernel": ("float32", (6, 4)),
        "layers.0.bias": ("float32", (4,)),
        "layers.1.kernel": ("float32", (4, 3)),
        "layers.1.bias": ("float32", (3,)),
    }


def test_a_linear_head_and_a_deep_one_are_read() -> None:
    assert same(
        load(replace(BUNDLE, neighbours=digest_of(b"kept")).dump()), replace(BUNDLE, neighbours=digest_of(b"kept"))
    )
    for units in ((8, 3), (8, 7, 6, 5, 4, 3)):
        assert same(load(make(units=units).dump()), make(units=units))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_bundle_without_a_bit_depth_has_the_full_one_and_one_with_a_smaller_one_is_of_format_3() -> None:
    manifest, _ = parts(BUNDLE.dump())
    assert (manifest["format"], "bit_depth" in manifest, load(BUNDLE.dump()).bit_depth) == (1, False, 16)
    manifest, _ = parts(replace(BUNDLE, bit_depth=12).dump())
    assert (manifest["format"], manifest["bit_depth"]) == (3, 12)
    with pytest.raises(BundleRefused, match=r"Expected a bit depth of 10, 12, 14, 16\. Received 9"):
        load(replace(BUNDLE, bit_depth=9).dump())


@pytest.mark.parametrize("number", [0, 4, 99, "1", None, 1.5])
def test_another_format_is_refused_by_its_number(number: object) -> None:
    with pytest.raises(BundleRefused, match=f"Expected a bundle of format 1 to 3. Received format {number}"):
        load(changed(lambda manifest, _: manifest.update(format=number)))


def test_another_format_is_told_even_if_nothing_else_is_understood() -> None:
    with pytest.raises(BundleRefused, match=r"Received format 4\."):
        load(joined({"format": 4, "graph": []}, {"x": np.zeros(1, np.float32)}))


def with_unit(bundle: Bundle, **changed: Any) -> Bundle:
    """Return a bundle whose last layer has a unit, and whose golden output is in that unit."""
    unit = Unit(np.array([1e12]), np.array([5.8]))
    last = replace(bundle.layers[-1], unit=unit)
    golden = bundle.golden_output * unit.scale + unit.mean
    return replace(bundle, **{"layers": (*bundle.layers[:-1], last), "golden_output": golden, **changed})


NUMBER = make(units=(6, 1), task=Task.REGRESSION, labels=())


def test_a_unit_is_kept_in_float64_and_makes_the_bundle_one_of_format_2() -> None:
    data = with_unit(NUMBER).dump()
    assert same(load(data), with_unit(NUMBER)) and parts(data)[0]["format"] == 2
    assert same(load(NUMBER.dump()), NUMBER) and parts(NUMBER.dump())[0]["format"] == 1  # as earlier versions wrote it


def test_a_unit_of_anything_but_one_number_is_refused() -> None:
    first = replace(make().layers[0], unit=Unit(np.zeros(4), np.ones(4)))
    wrong = [
        with_unit(make(units=(6, 1), task=Task.BINARY, labels=("a", "b"))),
        make(layers=(first, make().layers[1])),
        with_unit(NUMBER, golden_output=NUMBER.golden_output),
        replace(NUMBER, layers=(replace(NUMBER.layers[0], unit=Unit(np.zeros(2), np.ones(1))),)),
    ]
    for bundle in wrong:
        with pytest.raises(BundleRefused):
            load(bundle.dump())


def test_every_cut_of_a_bundle_is_refused() -> None:
    data = make(units=(2, 3), size=1, images=1).dump()
    for length in range(len(data)):
        with pytest.raises(BundleRefused):
            load(data[:length])
    with pytest.raises(BundleRefused):
        load(data + b"\0")


def headed(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no bundle at all",
        bytes(100),
        headed(b"[]"),
        headed(b"{}"),
        headed(b"null"),
        headed(b'{"__metadata__": {}}'),
        headed(b'{"__metadata__": {"espalier": 3}}'),
        headed(b'{"__metadata__": {"espalier": "no json"}}'),
        headed(b'{"__metadata__": {"espalier": "[]"}}'),
        headed(b'{"__metadata__": {"espalier": "3"}}'),
        headed(b'{"__metadata__": ["espalier"]}'),
        headed(b"[" * 100_000),
        headed(b"\xff\xfe{}"),
        headed(b"{}", 2**63),
        save_tensors({"x": np.zeros(1, np.float32)}),
        save_tensors({"x": np.zeros(1, np.float32)}, metadata={"format": "pt"}),
    ],
)
def test_what_is_no_bundle_is_refused(data: bytes) -> None:
    with pytest.raises(BundleRefused):
        load(data)


@pytest.mark.parametrize("key", sorted({*parts(BUNDLE.dump())[0]}))
def test_a_manifest_with_a_hole_is_refused(key: str) -> None:
    with pytest.raises(BundleRefused):
        load(changed(lambda manifest, _: manifest.pop(key)))


@pytest.mark.parametrize("name", sorted(parts(BUNDLE.dump())[1]))
def test_a_bundle_without_one_of_its_tensors_is_refused(name: str) -> None:
    with pytest.raises(BundleRefused):
        load(changed(lambda _, tensors: tensors.pop(name)))


@pytest.mark.parametrize(
    "values",
    [
        {"task": "clustering"},
        {"precision": "int4"},
        {"resize": "stretch"},
        {"backbone": "short"},
        {"backbone": 3},
        {"labels": 3},
        {"labels": None},
        {"layers": 3},
        {"layers": []},
        {"layers": ["dense"]},
        {"layers": [{"type": "dense"}]},
        {"layers": [{"type": "dense", "activation": "softmax"}] * 2},
    ],
)
def test_a_manifest_with_a_wrong_value_is_refused(values: Manifest) -> None:
    with pytest.raises(BundleRefused):
        load(changed(lambda manifest, _: manifest.update(values)))


def zeros(*shape: int, dtype: str = "float32") -> npt.NDArray[Any]:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers.0.kernel": zeros(6, 5)},
        {"layers.0.kernel": zeros(6)},
        {"layers.0.kernel": zeros()},
        {"layers.0.kernel": zeros(6, 4, 1)},
        {"layers.0.kernel": zeros(6, 4, dtype="float64")},
        {"layers.0.kernel": zeros(6, 4, dtype="int8")},
        {"layers.0.bias": zeros(5)},
        {"layers.0.bias": zeros(1)},
        {"layers.0.bias": zeros(4, 1)},
        {"layers.0.bias": zeros(4, dtype="float16")},
        {"layers.1.kernel": zeros(5, 3)},
        {"layers.1.kernel": zeros(4, 2), "layers.1.bias": zeros(2)},
        {"layers.1.kernel": zeros(4, 2), "layers.1.bias": zeros(2), "golden_output": zeros(2, 2)},
        {"layers.1.bias": zeros(4)},
        {"golden_input": zeros(2, 4, 4, 1, dtype="uint8")},
        {"golden_input": zeros(2, 3, 4, 4, dtype="uint8")},
        {"golden_input": zeros(2, 5, 5, 3, dtype="uint8")},
        {"golden_input": zeros(2, 4, 4, 3)},
        {"golden_input": zeros(3, 4, 4, 3, dtype="uint8")},
        {"golden_input": zeros(4, 4, 3, dtype="uint8")},
        {"golden_input": zeros(0, 4, 4, 3, dtype="uint8"), "golden_output": zeros(0, 3)},
        {"golden_output": zeros(2, 4)},
        {"golden_output": zeros(3, 3)},
        {"golden_output": zeros(2, 3, dtype="float64")},
        {"golden_output": zeros(6)},
    ],
)
def test_shapes_and_types_that_do_not_fit_are_refused(wrong: Tensors) -> None:
    with pytest.raises(BundleRefused):
        load(changed(lambda _, tensors: tensors.update(wrong)))


def test_a_size_other_than_that_of_the_golden_input_is_refused() -> None:
    with pytest.raises(
        BundleRefused, match=r"Expected golden_input to be uint8 \[2, 5, 5, 3\]\. Received uint8 \[2, 4"
    ):
        load(changed(lambda manifest, _: manifest.update(size=5)))


@pytest.mark.parametrize(
    ("task", "labels", "outputs"),
    [
        (Task.MULTICLASS, ("daisy", "rose"), 3),
        (Task.MULTICLASS, ("daisy", "rose", "tulip", "violet"), 3),
        (Task.MULTILABEL, (), 3),
        (Task.BINARY, ("daisy", "rose"), 2),
        (Task.BINARY, ("daisy",), 1),
        (Task.BINARY, ("daisy", "rose", "tulip"), 1),
        (Task.REGRESSION, ("weight",), 1),
        (Task.REGRESSION, (), 2),
    ],
)
def test_labels_that_do_not_fit_the_outputs_are_refused(task: Task, labels: tuple[str, ...], outputs: int) -> None:
    with pytest.raises(BundleRefused, match=f"{len(labels)} for {outputs} outputs"):
        load(make(task=task, labels=labels, units=(6, outputs)).dump())


def test_a_last_layer_that_is_not_linear_is_refused() -> None:
    first, last = BUNDLE.layers
    with pytest.raises(BundleRefused, match="Expected a linear last layer"):
        load(replace(BUNDLE, layers=(first, replace(last, activation=Activation.RELU))).dump())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_bundle_is_refused_or_fits_itself(changes: list[tuple[int, int]]) -> None:
    data = bytearray(BUNDLE.dump())
    for position, value in changes:
        data[position % len(data)] = value
    try:
        bundle = load(bytes(data))
    except BundleRefused:
        return
    assert bundle.layers[0].kernel.shape[1] == bundle.layers[1].kernel.shape[0]
    assert bundle.golden_input.shape == (2, bundle.size, bundle.size, 3)
