"""Fits the power law by which an error falls with the number of images: `a + b * n ** -c`. Knows no images, no folds.

Errors of many models and data sets fall like this (Hestness et al. 2017, "Deep Learning Scaling is Predictable,
Empirically"). The floor `a` is the error that remains with any number of images. No curve in use is known to
extrapolate better (Viering & Loog 2022, "The Shape of Learning Curves: a Review", where it is called POW3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.data.split import Indices
from training.data.targets import Float64

LEAST_POINTS = 4
"""The law has three parameters: it would fit any three points exactly."""

# Real data have exponents from 0.07 to 1. These are tried, each 1 % above the one before.
_EXPONENTS = np.geomspace(0.02, 2.0, 464)
# Curves that are fitted at once; more of them take more memory.
_CURVES_AT_ONCE = 100


@dataclass(frozen=True)
class PowerLaw:
    """`floor + scale * n ** -exponent` for n images; the parameters are float64 arrays of one shape, one per curve."""

    floor: Float64
    scale: Float64
    exponent: Float64

    def error(self, images: Float64) -> Float64:
        """Return the errors float64 [..., P] for P numbers of images, float64 [P]."""
        found: Float64 = self.floor[..., None] + self.scale[..., None] * images ** -self.exponent[..., None]
        return found


def fit_power_law(images: Float64, errors: Float64) -> PowerLaw:
    """Return the law that fits points best by least squares, with a floor and a scale of at least zero.

    For a given exponent the other two parameters are a linear problem with a formula. Therefore all exponents of a grid
    are tried: the fit needs no start values and has no local minima (variable projection, Golub & Pereyra 1973).

    Args:
        images: numbers of images, float64 [P], more than zero; not all equal.
        errors: the errors there, float64 [..., P], at least zero; each row is a curve of its own.
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
    """Return floor, scale and exponent, float64 [n] each, of errors [n, P] at images [P] of 1 at most."""
    falls = images ** -_EXPONENTS[:, None]  # [exponents, P]
    centred = falls - falls.mean(axis=1, keepdims=True)
    mean = errors.mean(axis=1, keepdims=True)
    # The best law with both, without a floor, and without a fall: the best allowed one of these is the answer.
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
