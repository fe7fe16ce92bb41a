"""The backbones that a recipe can name, as a static table. Knows no Keras, so that the API can import it.

A cut point, or cut, is a named layer whose output can become the features; its width is the number of channels there.
The networks are those of `keras.applications` without their top. The file names and MD5 sums of the ImageNet weights
are those that Keras publishes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from errors import RecipeInvalid

# The value of `unfreeze` that means: fine-tune all layers.
ALL = "all"


class BackboneName(StrEnum):
    """A pretrained convolutional network."""

    VGG16 = "vgg16"
    VGG19 = "vgg19"
    RESNET50 = "resnet50"
    INCEPTION_V3 = "inception_v3"
    XCEPTION = "xception"


class Preprocessing(StrEnum):
    """How a network expects its pixels: `caffe` is BGR minus the ImageNet means, `tf` is RGB from -1 to 1."""

    CAFFE = "caffe"
    TF = "tf"


@dataclass(frozen=True)
class WeightsFile:
    """A weights file that Keras publishes: its path below the base URL, and its MD5 sum."""

    path: str
    md5: str


@dataclass(frozen=True)
class Backbone:
    """One backbone of the catalogue.

    Attributes:
        name: its name in recipes.
        title: its name in reports.
        size: the default image size, the side of a square in pixels.
        minimum_size: the smallest image size, the side of a square in pixels.
        preprocessing: how the network expects its pixels.
        cuts: maps the name of each cut point to its width, in the order of the layers.
        imagenet: the file of the ImageNet weights.
    """

    name: BackboneName
    title: str
    size: int
    minimum_size: int
    preprocessing: Preprocessing
    cuts: Mapping[str, int]
    imagenet: WeightsFile

    @property
    def last_cut(self) -> str:
        """The last cut point, which is the end of the network without its top."""
        return list(self.cuts)[-1]

    def fitted(self, cut: str | None, size: int | None) -> tuple[str, int]:
        """Return the cut point and the image size. For None, these are the last cut point and the default size.

        Raises:
            RecipeInvalid: the network has no such cut, or needs larger images.
        """
        size = self.size if size is None else size
        if size < self.minimum_size:
            raise RecipeInvalid(
                "image_size", f"{self.title} needs images of at least {self.minimum_size} pixels. Received {size}."
            )
        cut = self.last_cut if cut is None else cut
        if cut not in self.cuts:
            raise RecipeInvalid(
                "features_from",
                f"{self.title} has no cut point {cut!r}. Choose one of its cut points: {', '.join(self.cuts)}.",
            )
        return cut, size

    def cut_before(self, unfreeze: str) -> str | None:
        """Return the last cut point of the layers that stay frozen.

        Args:
            unfreeze: the first cut point whose layers are fine-tuned, or `all`.

        Returns:
            the name of a cut point; None if no layer stays frozen.
        """
        names = list(self.cuts)
        position = 0 if unfreeze == ALL else names.index(unfreeze)
        return names[position - 1] if position else None


_VGG_CUTS = {"block1": 64, "block2": 128, "block3": 256, "block4": 512, "block5": 512}

CATALOGUE: Mapping[BackboneName, Backbone] = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            BackboneName.VGG16,
            "VGG16",
            size=224,
            minimum_size=32,
            preprocessing=Preprocessing.CAFFE,
            cuts=_VGG_CUTS,
            imagenet=WeightsFile(
                "vgg16/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5", "6d6bbae143d832006294945121d1f1fc"
            ),
        ),
        Backbone(
            BackboneName.VGG19,
            "VGG19",
            size=224,
            minimum_size=32,
            preprocessing=Preprocessing.CAFFE,
            cuts=_VGG_CUTS,
            imagenet=WeightsFile(
                "vgg19/vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5", "253f8cb515780f3b799900260a226db6"
            ),
        ),
        Backbone(
            BackboneName.RESNET50,
            "ResNet50",
            size=224,
            minimum_size=32,
            preprocessing=Preprocessing.CAFFE,
            cuts={"conv2": 256, "conv3": 512, "conv4": 1024, "conv5": 2048},
            imagenet=WeightsFile(
                "resnet/resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5", "4d473c1dd8becc155b73f8504c6f6626"
            ),
        ),
        Backbone(
            BackboneName.INCEPTION_V3,
            "InceptionV3",
            size=299,
            minimum_size=75,
            preprocessing=Preprocessing.TF,
            cuts={
                "mixed0": 256,
                "mixed1": 288,
                "mixed2": 288,
                "mixed3": 768,
                "mixed4": 768,
                "mixed5": 768,
                "mixed6": 768,
                "mixed7": 768,
                "mixed8": 1280,
                "mixed9": 2048,
                "mixed10": 2048,
            },
            imagenet=WeightsFile(
                "inception_v3/inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
                "bcbd6486424b2319ff4ef7d526e38f63",
            ),
        ),
        Backbone(
            BackboneName.XCEPTION,
            "Xception",
            size=299,
            minimum_size=71,
            preprocessing=Preprocessing.TF,
            cuts={
                "block2": 128,
                "block3": 256,
                **{f"block{number}": 728 for number in range(4, 13)},
                "block13": 1024,
                "block14": 2048,
            },
            imagenet=WeightsFile(
                "xception/xception_weights_tf_dim_ordering_tf_kernels_notop.h5", "b0042744bf5b25fce3cb969f33bebb97"
            ),
        ),
    )
}
