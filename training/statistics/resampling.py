"""What would other images have given? Intervals, drawn from what there is, of scores that are made of sums over images.

Images that belong together are drawn together: a group's pictures stand or fall with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from scipy import stats

from training.data.split import Indices
from training.data.targets import Float64

Scores = Callable[[Float64], Mapping[str, Float64]]

DRAWS = 2000
# More groups than this are put together at random beforehand: that changes the variance of a sum by about one percent.
_MOST_BLOCKS = 5000
_AT_ONCE = 250


def block_sums(statistics: Float64, groups: Indices) -> Float64:
    """Return float64 [B, ...], the sums of float64 [N, ...] over each group, or over some thousands of bags of groups.

    Equal groups give equal blocks, so that sums of different statistics can be compared block by block.
    """
    _, place = np.unique(groups, return_inverse=True)
    count = int(place.max()) + 1
    if count > _MOST_BLOCKS:
        place = (np.random.default_rng(0).permutation(count) % _MOST_BLOCKS)[place]
        count = _MOST_BLOCKS
    sums = np.zeros((count, *statistics.shape[1:]))
    np.add.at(sums, place, statistics)
    return sums


def draws(blocks: int, count: int = DRAWS) -> Iterator[Float64]:
    """Yield float64 [n, blocks] until `count` rows have come: how often each block is in a draw with replacement."""
    random = np.random.default_rng(0)
    for start in range(0, count, _AT_ONCE):
        yield random.multinomial(blocks, np.full(blocks, 1 / blocks), size=min(_AT_ONCE, count - start)).astype(float)


def bootstrap_interval(values: Float64, blocks: int) -> tuple[float, float]:
    """Return the 95 % interval by the percentiles of bootstrap draws, widened for few blocks.

    Percentiles alone are too narrow for few: they are taken further out, as far as Student's t is wider than the
    normal distribution (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 3.4).
    """
    tail = stats.norm.cdf(-np.sqrt(blocks / (blocks - 1)) * stats.t.ppf(0.975, blocks - 1))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_intervals(statistics: Float64, groups: Indices, scores: Scores) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each score over groups.

    Args:
        statistics: float64 [N, S], numbers of each image.
        groups: group of each image, int [N]; two groups or more.
        scores: turns sums, float64 [..., S], into scores [...] by name.
    """
    sums = block_sums(statistics, groups)
    drawn = [scores(counts @ sums) for counts in draws(len(sums))]
    return {name: bootstrap_interval(np.concatenate([found[name] for found in drawn]), len(sums)) for name in drawn[0]}
