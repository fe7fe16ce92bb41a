"""The law by which an error falls as there is more to learn from: `a + b * n ** -c`. Knows no images and no folds.

Errors of many models and data sets fall that way (Hestness et al. 2017, "Deep Learning Scaling is Predictable,
Empirically"), with a floor `a` that no number of images gets below; of the curves in use it extrapolates as well as any
(Viering & Loog 2022, "The Shape of Learning Curves: a Review", where it is POW3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.data.split import Indices
from training.data.targets import Float64

LEAST_POINTS = 4
"""Three numbers are fitted: with fewer points, any points at all would lie on a law."""

# Exponents that were found on real data are from 0.07 to 1; these are tried, each 1 % above the one before.
_EXPONENTS = np.geomspace(0.02, 2.0, 464)
# Of draws that are fitted together: the more, the more memory.
_AT_ONCE = 100


@dataclass(frozen=True)
class PowerLaw:
    """`floor + scale * n ** -exponent` for n images, float64 of one shape; what is computed has a last axis for n."""

    floor: Float64
    scale: Float64
    exponent: Float64

    def error(self, images: Float64) -> Float64:
        """Return the errors float64 [..., n] at so many images, float64 [n]."""
        found: Float64 = self.floor[..., None] + self.scale[..., None] * images ** -self.exponent[..., None]
        return found


def fit_power_law(images: Float64, errors: Float64) -> PowerLaw:
    """Return the law nearest to some points by least squares, with a floor and a scale of at least zero.

    For a given exponent the other two are a linear problem that has a formula, so that every exponent is tried and no
    start is needed: there is no other place to get stuck in (variable projection, Golub & Pereyra 1973).

    Args:
        images: float64 [P], more than zero; not all equal.
        errors: float64 [..., P], at least zero; several curves are fitted at once.
    """
    most = images.max()
    shape = errors.shape[:-1]
    curves = errors.reshape(-1, errors.shape[-1])
    pieces = [_fit(images / most, curves[start : start + _AT_ONCE]) for start in range(0, len(curves), _AT_ONCE)]
    floor, scale, exponent = (np.concatenate(parts).reshape(shape) for parts in zip(*pieces, strict=True))
    return PowerLaw(floor, scale * most**exponent, exponent)


def _fit(images: Float64, errors: Float64) -> tuple[Float64, Float64, Float64]:
    """Return floor, scale and exponent, float64 [n] each, of errors [n, P] at images [P] of 1 at most."""
    falls = images ** -_EXPONENTS[:, None]  # [exponents, P]
    centred = falls - falls.mean(axis=1, keepdims=True)
    mean = errors.mean(axis=1, keepdims=True)
    # The best of both, the best without a floor, and the best without a fall: one of them is the answer.
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
