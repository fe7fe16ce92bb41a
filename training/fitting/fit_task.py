"""What the fit of a network returns, whether the network is fine-tuned or begins with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from artifacts.bundle import Dense, Float32
from training.data.split import Indices
from training.fitting.training_loop import Trained


@dataclass(frozen=True)
class FittedNetwork:
    """A network that has learned, and the layers that follow it.

    Attributes:
        trained: how the training went.
        layers: the head on the network's raw features, with outputs in the targets' own unit.
        network: returns the weights of the network before the head, as `backbones.dump_weights` does.
        logits: returns float32 [n, outputs] for rows of the data, computed by Keras without augmentation.
    """

    trained: Trained
    layers: tuple[Dense, ...]
    network: Callable[[], bytes]
    logits: Callable[[Indices], Float32]
