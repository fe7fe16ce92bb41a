"""Fits power laws to learning curves: error = floor + scale * n ** -exponent for n training images.

The errors of many models and data sets fall like this (Hestness et al. 2017, "Deep Learning Scaling is Predictable,
Empirically"). The floor is the error that remains with any number of images. No other curve is known to extrapolate
better (Viering & Loog 2022, "The Shape of Learning Curves: a Review", which calls this curve POW3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.data.split import Indices
from training.data.targets import Float64

LEAST_POINTS = 4
"""The least number of points for a fit. The curve has three parameters, so that it fits any three points exactly."""

# The exponents to try, each 1 % larger than the one before. Those of real data are between 0.07 and 1.
_EXPONENTS = np.geomspace(0.02, 2.0, 464)
# How many curves are fitted at once, which limits the memory.
_CURVES_AT_ONCE = 100


@dataclass(frozen=True)
class PowerLaw:
    """One or several curves `floor + scale * n ** -exponent`. The parameters are float64 arrays of the same shape."""

    floor: Float64
    scale: Float64
    exponent: Float64

    def error(self, images: Float64) -> Float64:
        """Return the errors of each curve, float64 [..., P], for P numbers of images, float64 [P]."""
        found: Float64 = self.floor[..., None] + self.scale[..., None] * images ** -self.exponent[..., None]
        return found


def fit_power_law(images: Float64, errors: Float64) -> PowerLaw:
    """Fit power laws to points by least squares, with a floor and a scale of at least zero.

    For a given exponent, the best floor and scale have a formula. So all exponents of a grid are tried. This needs no
    initial values and finds no local minima (variable projection, Golub & Pereyra 1973).

    Args:
        images: the numbers of images, float64 [P], greater than zero and not all equal.
        errors: the errors for these numbers, float64 [..., P], at least zero. Each row is fitted by another curve.
    """
    most = images.max()
    shape = errors.shape[:-1]
    curves = errors.reshape(-1, errors.shape[-1])
    pieces = [
        _fit(images / most, curves[start : start + _CURVES_AT_ONCE]) for start in range(0, len(curves), _CURVES_AT_ONCE)
    ]
    floor, scale, exponent = (np.concatenate(parts).reshape(shape) for parts in zip(*pieces, strict=True))
    return PowerLaw(floor, scale * most**exponent, exponent)


def _fit(images: Float64, errors: Float64) -> tuple[Float64, Float64, Float64]:
    """Return floor, scale and exponent, float64 [n] each, for errors [n, P]. `images` [P] are scaled to at most 1."""
    falls = images ** -_EXPONENTS[:, None]  # [exponents, P]
    centred = falls - falls.mean(axis=1, keepdims=True)
    mean = errors.mean(axis=1, keepdims=True)
    # Three candidates: with floor and scale, without a floor, and constant. The best one that is allowed is returned.
    free = (errors - mean) @ centred.T / np.square(centred).sum(axis=1)
    through = errors @ falls.T / np.square(falls).sum(axis=1)
    scales = np.stack([free, np.maximum(through, 0.0), np.zeros_like(free)])
    floors = np.stack([mean - free * falls.mean(axis=1), np.zeros_like(free), np.broadcast_to(mean, free.shape)])
    misses = np.square(errors[None, :, None, :] - floors[..., None] - scales[..., None] * falls[None, None, :, :]).sum(
        axis=-1
    )
    misses[(scales < 0) | (floors < 0)] = np.inf
    by_curve = np.moveaxis(misses, 1, 0).reshape(len(errors), -1)
    kind, exponent = np.unravel_index(by_curve.argmin(axis=1), (3, len(_EXPONENTS)))
    rows: Indices = np.arange(len(errors))
    return floors[kind, rows, exponent], scales[kind, rows, exponent], _EXPONENTS[exponent]
