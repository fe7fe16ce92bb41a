"""Draws pictures that explain a prediction, from the maps that the backbone computed for it. Knows no HTTP, no engine.

A heat map is a class activation map (Zhou et al. 2016, "Learning Deep Features for Discriminative Localization"). The
features of a backbone are the mean of its maps over all positions. So the contribution of a position to a logit is the
gradient of the logit by the features, times the maps at this position. Grad-CAM (Selvaraju et al. 2017) gives the same
result for such networks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from PIL import Image

from artifacts.bundle import Dense, Float32
from artifacts.features import Features
from artifacts.images import Pixels
from errors import RequestInvalid
from inference import captions
from inference.heads import ACTIVATIONS
from recipes.layers import Activation, Sides, sides

# Fewer positions in height or width are too coarse for a heat map.
LEAST_SIDE = 4
CHANNELS = 16
# Smaller images are enlarged to this side, because a picture of 32 pixels is hard to see.
LEAST_PICTURE = 256
LEAST_TILE = 96

# Derivative of each activation as a function of its output.
_SLOPES: Mapping[Activation, Callable[[Float32], Float32]] = {
    Activation.LINEAR: np.ones_like,
    Activation.RELU: lambda y: (y > 0).astype(np.float32),
    Activation.SIGMOID: lambda y: y * (1 - y),
    Activation.TANH: lambda y: 1 - y * y,
}


class Explanation(StrEnum):
    """The kinds of explanation.

    `heatmap` shows which positions of the image support the answer, `activations` the strongest maps, and `neighbours`
    the most similar training images.
    """

    HEATMAP = "heatmap"
    ACTIVATIONS = "activations"
    NEIGHBOURS = "neighbours"

    @property
    def needs_maps(self) -> bool:
        """Whether this kind of explanation needs the maps of the backbone in addition to the features."""
        return self is not Explanation.NEIGHBOURS


def gradient(layers: Sequence[Dense], features: Features, output: int) -> Float32:
    """Return the gradient of one logit by the features, float32 [D].

    Args:
        layers: the head.
        features: float32 [D], the features at which the gradient is computed.
        output: index of the logit.
    """
    outputs: list[Float32] = []
    x: Float32 = features
    for layer in layers:
        centred: Float32 = x if layer.offset is None else x - layer.offset
        x = ACTIVATIONS[layer.activation](centred @ layer.kernel + layer.bias)
        outputs.append(x)
    slope: Float32 = np.zeros_like(x)
    slope[output] = 1 if layers[-1].unit is None else layers[-1].unit.scale[output]
    for layer, y in zip(reversed(layers), reversed(outputs), strict=True):
        slope = layer.kernel @ (slope * _SLOPES[layer.activation](y))
    return slope


def heat(layers: Sequence[Dense], features: Features, maps: Features, output: int) -> Float32:
    """Return the contribution of each position of an image to one logit, float32 [h, w].

    For a linear head, the mean of the result is the logit without the bias and the offset.

    Args:
        layers: the head.
        features: float32 [D], the features of the image.
        maps: float32 [h, w, D], the maps of the image.
        output: index of the logit.
    """
    found: Float32 = maps @ gradient(layers, features, output)
    return found


def check_side(maps: Features, size: Sides) -> None:
    """Check that maps have enough positions for a picture.

    Args:
        maps: float32 [..., h, w, D].
        size: the image size of the model, for the error message.

    Raises:
        RequestInvalid: h or w is less than `LEAST_SIDE`.
    """
    side = min(maps.shape[-3:-1])
    if side < LEAST_SIDE:
        enough = -(-LEAST_SIDE * min(sides(size)) // side)
        raise RequestInvalid(
            f"explain: The maps of this model have only {side}×{side} positions at {min(sides(size))} pixels. A "
            f"picture needs at least {LEAST_SIDE}×{LEAST_SIDE}. Train with image_size {enough} or more, or take "
            "features_from an earlier cut point. A network from scratch needs a global_average layer at its end.",
            field="explain",
        )


def overlay(pixels: Pixels, places: Float32, title: str) -> bytes:
    """Return a PNG of an image in which positions that support the answer glow and all others are dark.

    Below the image are the title and a colour scale with the smallest and the largest contribution.

    Args:
        pixels: the image, uint8 [H, W, 3].
        places: the contribution of each position, float32 [h, w]; negative contributions are not shown.
        title: what the contributions support, such as the explained class.
    """
    height, width = pixels.shape[:2]
    enlarge = max(1.0, LEAST_PICTURE / min(height, width))
    size = round(width * enlarge), round(height * enlarge)
    picture = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR), dtype=np.float32)
    positive = np.maximum(places, 0)
    most = float(positive.max())
    level = positive / max(most, float(np.finfo(np.float32).tiny))
    large = np.asarray(Image.fromarray(level).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    scale = np.tile(np.linspace(0, 1, size[0], dtype=np.float32)[None, :, None], (captions.LINE // 2, 1, 1))
    if most == 0:
        scale[:] = 0
    bar = _glowing(np.full((*scale.shape[:2], 3), 128, np.float32), scale)
    text = captions.caption(size[0], title, "0" if most else "no part of the image supports it")
    if most:
        at_most = f"{most:+.3g}"
        width = int(np.ceil(captions.text_width(at_most)))
        captions.write(text, (size[0] - width - 2, captions.LINE), at_most, width)
    return png(captions.below(np.concatenate([_glowing(picture, large), bar]), text))


def _glowing(picture: Float32, level: Float32) -> Pixels:
    """Return colours [H, W, 3] that glow from red to yellow by a level [H, W, 1] from 0 to 1; the rest is darker."""
    glow = np.concatenate([np.full_like(level, 255), 255 * level, np.zeros_like(level)], axis=2)
    mixed = picture * (0.35 + 0.25 * (1 - level)) + glow * (0.6 * level)
    colours: Pixels = mixed.clip(0, 255).astype(np.uint8)
    return colours


def grid(maps: Features, channels: int = CHANNELS) -> bytes:
    """Return a PNG with the strongest channels of maps [h, w, D] as tiles, the strongest first, row by row.

    Channels are ranked by their mean absolute value. Each is scaled from black (its minimum) to white (its maximum).
    Below each are its number, from 0, and its minimum and maximum. Small maps are enlarged, and keep their proportions.
    """
    strongest = np.argsort(np.abs(maps).mean(axis=(0, 1)))[::-1][:channels]
    lows, highs = maps.min(axis=(0, 1)), maps.max(axis=(0, 1))
    texts = [(f"channel {one}", f"{lows[one]:.3g} to {highs[one]:.3g}") for one in strongest]
    columns = int(np.ceil(np.sqrt(len(strongest))))
    rows = -(-len(strongest) // columns)
    longest = max(int(np.ceil(captions.text_width(line))) + 4 for lines in texts for line in lines)
    least, most = sorted(maps.shape[:2])
    enlarge = max(1.0, longest / maps.shape[1], min(LEAST_TILE / least, 4 * LEAST_TILE / most))
    tall, wide = (round(side * enlarge) for side in maps.shape[:2])
    widest = max(longest, wide)
    width, height = widest + 2, tall + 2 + 2 * captions.LINE
    sheet = Image.new("L", (columns * width, rows * height), 0)
    for place, (channel, lines) in enumerate(zip(strongest, texts, strict=True)):
        low, high = float(lows[channel]), float(highs[channel])
        spread = max(high - low, float(np.finfo(np.float32).tiny))
        level = (255 * (maps[:, :, channel] - low) / spread).astype(np.uint8)
        top, left = place // columns * height, place % columns * width
        sheet.paste(Image.fromarray(level).resize((wide, tall), Image.Resampling.NEAREST), (left, top))
        sheet.paste(captions.caption(widest, *lines).convert("L"), (left, top + tall))
    return png(np.asarray(sheet))


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return pixels as a PNG file. They are uint8, grey [H, W] or RGB [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
