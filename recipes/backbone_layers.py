"""The catalogue's networks layer by layer, as `keras.applications` builds them without their top. Knows no Keras.

Names are those of Keras where it has any of its own; what it only counts (`conv2d_17`) is named by its place instead.
Works out no shapes: `recipes.shapes` does. A test holds every layer against Keras.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recipes.catalogue import BackboneName
from recipes.layers import (
    INPUT,
    Activation,
    AnyLayer,
    BareConvolution,
    BatchNormalization,
    Concatenation,
    Convolution,
    OffsetNormalization,
    Padding,
    Pooling,
    PoolingKind,
    Rectifier,
    SeparableConvolution,
    Sum,
    ZeroPadding,
)


def backbone_layers(name: BackboneName, cut: str) -> tuple[AnyLayer, ...]:
    """Return the layers of a network from its pixels to a cut of the catalogue, each after those that it reads."""
    match name:
        case BackboneName.VGG16:
            layers = _vgg((2, 2, 3, 3, 3))
        case BackboneName.VGG19:
            layers = _vgg((2, 2, 4, 4, 4))
        case BackboneName.RESNET50:
            layers = _resnet50()
        case BackboneName.INCEPTION_V3:
            layers = _inception_v3()
        case BackboneName.XCEPTION:
            layers = _xception()
    last = _last_layer(name, cut)
    end = next(number for number, layer in enumerate(layers, start=1) if layer.name == last)
    return tuple(layers[:end])


def _last_layer(name: BackboneName, cut: str) -> str:
    """Return the layer whose output a cut names."""
    match name:
        case BackboneName.VGG16 | BackboneName.VGG19:
            return f"{cut}_pool"
        case BackboneName.RESNET50:
            stage = int(cut.removeprefix("conv"))
            return f"{cut}_block{_RESNET50[stage - 2][1]}_out"
        case BackboneName.INCEPTION_V3:
            return cut
        case BackboneName.XCEPTION:
            return "block14_sepconv2_act" if cut == "block14" else f"{cut}_add"


class _Layers(list[AnyLayer]):
    """Layers as they are put down."""

    @property
    def last(self) -> str:
        """The name of the layer that was put down last."""
        return (self[-1].name or "") if self else INPUT

    def put(self, layer: AnyLayer, *inputs: str) -> str:
        """Put a layer behind others, by default behind the last one, and return its name."""
        self.append(layer.model_copy(update={"inputs": inputs or (self.last,)}))
        return self.last


# --- VGG: Simonyan & Zisserman 2014 --------------------------------------------------------------------------------


def _vgg(depths: Sequence[int]) -> _Layers:
    layers = _Layers()
    for block, (filters, depth) in enumerate(zip((64, 128, 256, 512, 512), depths, strict=True), start=1):
        for number in range(1, depth + 1):
            name = f"block{block}_conv{number}"
            layers.put(Convolution(name=name, filters=filters, padding=Padding.SAME))
        layers.put(Pooling(name=f"block{block}_pool"))
    return layers


# --- ResNet50: He et al. 2015 --------------------------------------------------------------------------------------

# Filters and blocks of the stages conv2 to conv5.
_RESNET50 = ((64, 3), (128, 4), (256, 6), (512, 3))


def _resnet50() -> _Layers:
    layers = _Layers()
    layers.put(ZeroPadding(name="conv1_pad", width=3))
    _normalised(layers, "conv1", _linear(filters=64, kernel=7, stride=2))
    layers.put(Rectifier(name="conv1_relu"))
    layers.put(ZeroPadding(name="pool1_pad", width=1))
    layers.put(Pooling(name="pool1_pool", size=3, stride=2))
    for stage, (filters, blocks) in enumerate(_RESNET50, start=2):
        for block in range(1, blocks + 1):
            stride = 2 if stage > 2 and block == 1 else 1
            _bottleneck(layers, f"conv{stage}_block{block}", filters, stride, is_first=block == 1)
    return layers


def _bottleneck(layers: _Layers, name: str, filters: int, stride: int, *, is_first: bool) -> None:
    """Put down a block that adds to what it reads; the first of a stage changes the shape of that, too."""
    before = shortcut = layers.last
    if is_first:
        shortcut = _normalised(layers, f"{name}_0", _linear(filters=4 * filters, kernel=1, stride=stride))
    _normalised(layers, f"{name}_1", _linear(filters=filters, kernel=1, stride=stride), before)
    layers.put(Rectifier(name=f"{name}_1_relu"))
    _normalised(layers, f"{name}_2", _linear(filters=filters, kernel=3, stride=1))
    layers.put(Rectifier(name=f"{name}_2_relu"))
    made = _normalised(layers, f"{name}_3", _linear(filters=4 * filters, kernel=1, stride=1))
    layers.put(Sum(name=f"{name}_add"), shortcut, made)
    layers.put(Rectifier(name=f"{name}_out"))


def _linear(filters: int, kernel: int, stride: int) -> Convolution:
    padding = Padding.SAME if kernel == 3 else Padding.VALID
    return Convolution(filters=filters, kernel=kernel, stride=stride, padding=padding, activation=Activation.LINEAR)


def _normalised(layers: _Layers, name: str, convolution: Convolution, *inputs: str) -> str:
    layers.put(convolution.model_copy(update={"name": f"{name}_conv"}), *inputs)
    return layers.put(BatchNormalization(name=f"{name}_bn"))


# --- InceptionV3: Szegedy et al. 2015 ------------------------------------------------------------------------------

_Window = tuple[int, int]
_Steps = Sequence[tuple[int, _Window]]
"""Convolutions one after the other: filters, and height and width of the kernel."""


def _inception_v3() -> _Layers:
    layers = _Layers()
    _unit(layers, "conv1", 32, (3, 3), stride=2, padding=Padding.VALID)
    _unit(layers, "conv2", 32, (3, 3), padding=Padding.VALID)
    _unit(layers, "conv3", 64, (3, 3))
    layers.put(Pooling(name="pool1", size=3, stride=2))
    _unit(layers, "conv4", 80, (1, 1), padding=Padding.VALID)
    _unit(layers, "conv5", 192, (3, 3), padding=Padding.VALID)
    layers.put(Pooling(name="pool2", size=3, stride=2))
    twice = [(64, (1, 1)), (96, (3, 3)), (96, (3, 3))]
    for number, pooled in enumerate((32, 64, 64)):
        branches = {"1x1": [(64, (1, 1))], "5x5": [(48, (1, 1)), (64, (5, 5))], "3x3dbl": twice}
        _mixed(layers, f"mixed{number}", branches, pooled)
    _shrunk(layers, "mixed3", {"3x3": [(384, (3, 3))], "3x3dbl": twice})
    for number, inner in enumerate((128, 160, 160, 192), start=4):
        once = [(inner, (1, 1)), (inner, (1, 7)), (192, (7, 1))]
        again = [(inner, (1, 1)), (inner, (7, 1)), (inner, (1, 7)), (inner, (7, 1)), (192, (1, 7))]
        _mixed(layers, f"mixed{number}", {"1x1": [(192, (1, 1))], "7x7": once, "7x7dbl": again}, pooled=192)
    wide = [(192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3))]
    _shrunk(layers, "mixed8", {"3x3": [(192, (1, 1)), (320, (3, 3))], "7x7x3": wide})
    _forked(layers, "mixed9")
    _forked(layers, "mixed10")
    return layers


def _mixed(layers: _Layers, name: str, branches: Mapping[str, _Steps], pooled: int) -> None:
    """Put down branches side by side, the last one of means that are mixed to `pooled` channels."""
    before = layers.last
    ends = [_branch(layers, f"{name}_{branch}", steps, before) for branch, steps in branches.items()]
    layers.put(Concatenation(name=name), *ends, _pooled(layers, name, pooled, before))


def _shrunk(layers: _Layers, name: str, branches: Mapping[str, _Steps]) -> None:
    """Put down branches side by side that end in half as many pixels."""
    before = layers.last
    ends = []
    for branch, steps in branches.items():
        *first, (filters, kernel) = steps
        read = _branch(layers, f"{name}_{branch}", first, before)
        last = f"{name}_{branch}_{len(steps)}"
        ends.append(_unit(layers, last, filters, kernel, read, stride=2, padding=Padding.VALID))
    pool = layers.put(Pooling(name=f"{name}_pool", size=3, stride=2), before)
    layers.put(Concatenation(name=name), *ends, pool)


def _forked(layers: _Layers, name: str) -> None:
    """Put down the widest kind: two branches end in a row of three pixels beside a column of three."""
    before = layers.last
    ends = [_branch(layers, f"{name}_1x1", [(320, (1, 1))], before)]
    for branch, steps in (("3x3", [(384, (1, 1))]), ("3x3dbl", [(448, (1, 1)), (384, (3, 3))])):
        stem = _branch(layers, f"{name}_{branch}", steps, before)
        row = _unit(layers, f"{name}_{branch}_row", 384, (1, 3), stem)
        column = _unit(layers, f"{name}_{branch}_column", 384, (3, 1), stem)
        ends.append(layers.put(Concatenation(name=f"{name}_{branch}"), row, column))
    layers.put(Concatenation(name=name), *ends, _pooled(layers, name, 192, before))


def _branch(layers: _Layers, name: str, steps: _Steps, before: str) -> str:
    for number, (filters, kernel) in enumerate(steps, start=1):
        before = _unit(layers, f"{name}_{number}", filters, kernel, before)
    return before


def _pooled(layers: _Layers, name: str, filters: int, before: str) -> str:
    mean = Pooling(name=f"{name}_pool", kind=PoolingKind.AVERAGE, size=3, stride=1, padding=Padding.SAME)
    return _unit(layers, f"{name}_pool_1", filters, (1, 1), layers.put(mean, before))


def _unit(
    layers: _Layers,
    name: str,
    filters: int,
    kernel: _Window,
    *inputs: str,
    stride: int = 1,
    padding: Padding = Padding.SAME,
) -> str:
    """Put down a convolution with its BatchNorm and ReLU."""
    convolution = BareConvolution(name=f"{name}_conv", filters=filters, kernel=kernel, stride=stride, padding=padding)
    layers.put(convolution, *inputs)
    layers.put(OffsetNormalization(name=f"{name}_bn"))
    return layers.put(Rectifier(name=f"{name}_relu"))


# --- Xception: Chollet 2017 ----------------------------------------------------------------------------------------


def _xception() -> _Layers:
    layers = _Layers()
    for number, (filters, stride) in enumerate(((32, 2), (64, 1)), start=1):
        name = f"block1_conv{number}"
        layers.put(BareConvolution(name=name, filters=filters, stride=stride))
        layers.put(BatchNormalization(name=f"{name}_bn"))
        layers.put(Rectifier(name=f"{name}_act"))
    _shrinking(layers, "block2", (128, 128), is_rectified=True)
    _shrinking(layers, "block3", (256, 256))
    _shrinking(layers, "block4", (728, 728))
    for block in range(5, 13):
        before = layers.last
        _separable(layers, f"block{block}", (728, 728, 728), before)
        layers.put(Sum(name=f"block{block}_add"), layers.last, before)
    _shrinking(layers, "block13", (728, 1024))
    for number, filters in enumerate((1536, 2048), start=1):
        name = f"block14_sepconv{number}"
        layers.put(SeparableConvolution(name=name, filters=filters))
        layers.put(BatchNormalization(name=f"{name}_bn"))
        layers.put(Rectifier(name=f"{name}_act"))
    return layers


def _shrinking(layers: _Layers, name: str, filters: Sequence[int], *, is_rectified: bool = False) -> None:
    """Put down a block that halves its maps."""
    before = layers.last
    residual = BareConvolution(
        name=f"{name}_residual_conv", filters=filters[-1], kernel=1, stride=2, padding=Padding.SAME
    )
    layers.put(residual)
    shortcut = layers.put(BatchNormalization(name=f"{name}_residual_bn"))
    _separable(layers, name, filters, before, is_rectified=is_rectified)
    pool = layers.put(Pooling(name=f"{name}_pool", size=3, stride=2, padding=Padding.SAME))
    layers.put(Sum(name=f"{name}_add"), pool, shortcut)


def _separable(layers: _Layers, name: str, filters: Sequence[int], before: str, *, is_rectified: bool = False) -> None:
    """Put down separable convolutions, each behind a ReLU but where what they read comes from one."""
    for number, width in enumerate(filters, start=1):
        part = f"{name}_sepconv{number}"
        if number > 1 or not is_rectified:
            before = layers.put(Rectifier(name=f"{part}_act"), before)
        layers.put(SeparableConvolution(name=part, filters=width), before)
        before = layers.put(BatchNormalization(name=f"{part}_bn"))
