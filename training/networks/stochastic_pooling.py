"""Stochastic pooling as a Keras layer.

Source: Zeiler & Fergus 2013, "Stochastic Pooling for Regularization of Deep Convolutional Neural Networks".
"""

from __future__ import annotations

from typing import Any

import keras


class StochasticPooling(keras.layers.Layer):  # type: ignore[misc]
    """Pools maps [N, h, w, C]: from each window it draws one value at random, larger values more often.

    The probability of value a_i is p_i = a_i / sum(a) over the window (formula 4 of the paper). Training draws one a_i.
    Prediction returns the mean weighted by p, sum(p_i * a_i) (formula 6). Negative values count as zero. A window of
    zeros gives zero.
    """

    def __init__(self, size: tuple[int, int], stride: tuple[int, int], padding: str, **options: Any) -> None:
        super().__init__(**options)
        self._size, self._stride, self._padding = size, stride, padding
        self._seeds = keras.random.SeedGenerator()

    def call(self, maps: Any, training: bool = False) -> Any:
        positive = keras.ops.relu(maps)
        if not training:  # sum(a²) / sum(a): both means are over the same positions, whose number cancels out
            pool = {"pool_size": self._size, "strides": self._stride, "padding": self._padding}
            mean = keras.ops.average_pool(positive, **pool)
            return keras.ops.average_pool(keras.ops.square(positive), **pool) / keras.ops.where(mean > 0, mean, 1.0)
        values = self._windows(positive)
        # Draw the first position at which the running sum exceeds a random point between zero and the whole sum.
        running = keras.ops.cumsum(values, axis=0)
        point = keras.random.uniform(keras.ops.shape(running[-1]), dtype=values.dtype, seed=self._seeds) * running[-1]
        passed = keras.ops.cast(running > point[None], values.dtype)
        before = keras.ops.concatenate([keras.ops.zeros_like(passed[:1]), passed[:-1]], axis=0)
        return keras.ops.sum(values * (passed - before), axis=0)

    def compute_output_shape(self, shape: Any) -> Any:
        sides = zip(shape[1:3], self._size, self._stride, strict=True)
        if self._padding == "same":
            down, across = (-(-side // stride) for side, _, stride in sides)
        else:
            down, across = ((side - size) // stride + 1 for side, size, stride in sides)
        return (shape[0], down, across, shape[3])

    def _windows(self, maps: Any) -> Any:
        """Return the values of all windows, [positions, N, h, w, C]. The first axis is the position in the window.

        Positions beyond the border of the map have value zero.
        """
        _, down, across, _ = self.compute_output_shape(maps.shape)
        spans = [
            ((count - 1) * stride + size, side)
            for count, size, stride, side in zip((down, across), self._size, self._stride, maps.shape[1:3], strict=True)
        ]
        lacking = [max(0, span - side) for span, side in spans]
        maps = keras.ops.pad(maps, [(0, 0), *((lack // 2, lack - lack // 2) for lack in lacking), (0, 0)])
        (rows, columns), (row_step, column_step) = self._size, self._stride
        return keras.ops.stack(
            [
                maps[
                    :,
                    row : row + (down - 1) * row_step + 1 : row_step,
                    column : column + (across - 1) * column_step + 1 : column_step,
                ]
                for row in range(rows)
                for column in range(columns)
            ],
            axis=0,
        )
