"""Bootstrap intervals of scores that are computed from sums over images.

Images of one group are drawn together, since they are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from scipy import stats

from training.data.split import Indices
from training.data.targets import Float64

Scores = Callable[[Float64], Mapping[str, Float64]]

DRAWS = 2000
# If there are more groups than this, they are merged at random. That changes the variance of a sum by about 1 %.
_MOST_BLOCKS = 5000
_DRAWS_AT_ONCE = 250


def block_sums(statistics: Float64, groups: Indices) -> Float64:
    """Return the sums of statistics float64 [N, ...] over blocks of images, float64 [B, ...].

    A block is a group, or several groups if there are very many. The same groups always give the same blocks, so that
    sums of different statistics can be compared block by block.
    """
    block = blocks(groups)
    sums = np.zeros((int(block.max()) + 1, *statistics.shape[1:]))
    np.add.at(sums, block, statistics)
    return sums


def blocks(groups: Indices) -> Indices:
    """Return the block of each image, int [N] from 0: its group, or one of several groups if there are very many."""
    _, block = np.unique(groups, return_inverse=True)
    count = int(block.max()) + 1
    if count > _MOST_BLOCKS:
        block = (np.random.default_rng(0).permutation(count) % _MOST_BLOCKS)[block]
    return np.asarray(block, dtype=np.intp)


def draws(blocks: int, count: int = DRAWS) -> Iterator[Float64]:
    """Yield `count` bootstrap draws with replacement, in chunks float64 [n, blocks]: how often each block is drawn."""
    random = np.random.default_rng(0)
    for start in range(0, count, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, count - start)
        yield random.multinomial(blocks, np.full(blocks, 1 / blocks), size=size).astype(float)


def bootstrap_interval(values: Float64, blocks: int) -> tuple[float, float]:
    """Return the 95 % interval as percentiles of bootstrap draws.

    For few blocks, an interval between plain percentiles is too narrow. So the percentiles are moved outwards in the
    ratio of Student's t to the normal distribution (Hesterberg 2015, "What Teachers Should Know About the Bootstrap",
    section 3.4).

    Args:
        values: the score in each draw, float64 [draws]; draws that have no score, NaN, are left out.
        blocks: number of blocks that were drawn from; at least two.
    """
    tail = stats.norm.cdf(-np.sqrt(blocks / (blocks - 1)) * stats.t.ppf(0.975, blocks - 1))
    has_score = ~np.isnan(values)
    if not has_score.any():
        return 0.0, 0.0
    low, high = np.quantile(values[has_score], [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_intervals(statistics: Float64, groups: Indices, scores: Scores) -> dict[str, tuple[float, float]]:
    """Return the 95 % bootstrap interval of each score by name, with groups as blocks.

    Args:
        statistics: the statistics of each image, float64 [N, S].
        groups: group of each image, int [N]; at least two groups.
        scores: turns sums, float64 [..., S], into scores [...] by name.
    """
    sums = block_sums(statistics, groups)
    drawn = [scores(counts @ sums) for counts in draws(len(sums))]
    return {name: bootstrap_interval(np.concatenate([found[name] for found in drawn]), len(sums)) for name in drawn[0]}
