"""Trains parts of a run inside a child process: the preparation, folds, the final fit, or all of them.

The process keeps what several parts of a run need, such as the network and the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.bucket_store import open_store
from artifacts.images import IMAGE_RULE
from artifacts.store import Digest
from errors import OutOfMemory
from recipes.catalogue import BackboneName
from recipes.filled import parse_filled
from worker.child import weights
from worker.child.channel import Channel
from worker.child.run_reporter import RunReporter, store_file
from worker.messages import (
    AddBackbone,
    AddQuantised,
    ChoiceAnswer,
    DigestAnswer,
    FindBackbone,
    FindFeaturesChoice,
    FindPrecisionChoice,
    FindQuantised,
    JobProgress,
    JsonObject,
    Order,
    Prepared,
    Progress,
    RunOutcome,
    SetFeaturesChoice,
    SetPrecisionChoice,
    Stored,
    TrainOrder,
    TrainPart,
    WeightsObtained,
)

if TYPE_CHECKING:
    from training.experiment import Experiment
    from training.fitting.fold_outcome import FoldOutcome
    from training.networks.network_files import BackboneKey


def train(order: Order, channel: Channel) -> None:
    """Carry out this order and then each further one that the worker sends.

    Sends the messages of `worker.messages.TrainMessage`. The last message of an order is Prepared, FoldEnded or
    RunOutcome. The function never returns: the process ends when its worker closes the pipe.
    """
    session: _TrainingSession | None = None
    while True:
        if not isinstance(order, TrainOrder):
            raise TypeError(f"Expected a further TrainOrder. Received {order!r}. This is a bug.")
        try:
            if session is None or not session.fits(order):
                session = _TrainingSession(order, channel)
            session.do(order)
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) or type(error).__name__ == "ResourceExhaustedError":
                # TensorFlow and JAX report it this way. Neither is imported here, so their classes cannot be caught.
                raise OutOfMemory(f"The network and its batch do not fit into memory: {error}") from error
            raise
        order = channel.next_order()


class _TrainingSession:
    """The prepared experiment of one run, which trains one part after the other."""

    def __init__(self, order: TrainOrder, channel: Channel) -> None:
        self._spec = order.spec
        self._channel = channel
        self._store = open_store(order.spec.store)
        self._recipe = parse_filled(order.spec.recipe)
        self._reporter = RunReporter(channel, self._store, order)
        self._weights = self._find_weights()
        self._reporter.belongs = {
            "run": order.spec.run,
            "manifest": order.spec.manifest,
            "weights": self._weights,
            "recipe": self._recipe.model_dump(mode="json"),
        }
        self._experiment = self._prepare()

    def fits(self, order: TrainOrder) -> bool:
        """Return whether this experiment can also carry out another order: one of the same run with the same recipe."""
        spec, mine = order.spec, self._spec
        return spec.weights in (None, self._weights) and all(
            getattr(spec, name) == getattr(mine, name) for name in ("run", "recipe", "manifest", "labels", "threads")
        )

    def do(self, order: TrainOrder) -> None:
        """Train the part of the run that the order names, and send its results."""
        self._reporter.order = order
        folds = range(len(self._experiment.folds))
        match order.part:
            case TrainPart.PREPARE:
                self._channel.send(Prepared())
            case TrainPart.FOLD:
                self._experiment.learn_fold(order.fold)
            case TrainPart.FINAL:
                self._finish(order, [self._outcome(order, number) for number in folds])
            case TrainPart.ALL:
                left = [number for number in folds if number not in order.outcomes]
                learned = dict(zip(left, self._experiment.learn_folds(left), strict=True))
                self._finish(order, [learned.get(number) or self._outcome(order, number) for number in folds])

    def _finish(self, order: TrainOrder, outcomes: Sequence[FoldOutcome]) -> None:
        outcome = self._experiment.finish(outcomes, order.extraction)
        self._channel.send(
            RunOutcome(
                bundle=outcome.bundle,
                backbone=outcome.backbone,
                metrics=outcome.metrics,
                training_s=outcome.training_s,
                files=tuple(
                    store_file(self._store, name, data, media_type)
                    for name, (data, media_type) in outcome.files.items()
                ),
            )
        )

    def _outcome(self, order: TrainOrder, number: int) -> FoldOutcome:
        from training.fitting import fold_outcome

        return fold_outcome.load(self._store.read(order.outcomes[number]))

    def _find_weights(self) -> Digest | None:
        """Return the stored weights of the backbone; download or create them first if they are missing.

        Return None for a network from scratch, and if the backbone is still to be chosen.
        """
        spec, recipe = self._spec, self._recipe
        backbone = recipe.backbone
        if not isinstance(backbone, BackboneName) or recipe.weights is None:
            return None
        if spec.weights is not None:
            return spec.weights

        def downloaded(done_bytes: int, total_bytes: int | None, eta_s: float | None) -> None:
            share = done_bytes / total_bytes if total_bytes else 0.0
            self._channel.send(Progress(state=JobProgress(stage="weights", share=share, eta_s=eta_s)))

        found = weights.obtain(backbone, recipe.weights, self._store, spec.source, downloaded)
        self._channel.ask(
            WeightsObtained(network=backbone, name=recipe.weights, sha256=found.sha256, source=found.source), Stored
        )
        return found.sha256

    def _prepare(self) -> Experiment:
        spec = self._spec
        # Imported here, because TensorFlow takes seconds to import and missing weights must be reported before that.
        from training.experiment import Experiment
        from training.networks.network_files import Workspace
        from training.setup import TrainingRequest

        workspace = Workspace(
            store=self._store,
            features=Path(spec.features),
            pixels=Path(spec.pixels),
            pixels_bytes=spec.pixels_bytes,
            image_limits=spec.image_limits,
            threads=spec.threads,
            bit_depth=spec.bit_depth,
        )
        candidates = {name: digest for name, digest in spec.candidates.items() if self._store.has(digest)}
        request = TrainingRequest(self._recipe, spec.manifest, spec.labels, self._weights, candidates)
        return Experiment(request, workspace, _WorkerRegistry(self._channel), self._reporter)


class _WorkerRegistry:
    """The `Registry` of an experiment. It asks the worker, because a child cannot reach the database."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def find_backbone(self, key: BackboneKey) -> Digest | None:
        return self._channel.ask(FindBackbone(**asdict(key)), DigestAnswer).digest

    def add_backbone(self, key: BackboneKey, digest: Digest, facts: JsonObject) -> Digest:
        return self._settled(AddBackbone(**asdict(key), digest=digest, facts=facts))

    def find_quantised(self, backbone: Digest) -> Digest | None:
        return self._channel.ask(FindQuantised(backbone=backbone, image_rule=IMAGE_RULE), DigestAnswer).digest

    def add_quantised(self, backbone: Digest, digest: Digest, facts: JsonObject) -> Digest:
        return self._settled(AddQuantised(backbone=backbone, image_rule=IMAGE_RULE, digest=digest, facts=facts))

    def find_bake_off_result(self) -> JsonObject | None:
        return self._channel.ask(FindFeaturesChoice(), ChoiceAnswer).choice

    def set_bake_off_result(self, facts: JsonObject) -> None:
        self._channel.ask(SetFeaturesChoice(choice=facts, weights=facts["weights"]), Stored)

    def find_precision_decision(self) -> JsonObject | None:
        return self._channel.ask(FindPrecisionChoice(), ChoiceAnswer).choice

    def set_precision_decision(self, facts: JsonObject) -> None:
        self._channel.ask(SetPrecisionChoice(choice=facts), Stored)

    def _settled(self, question: AddBackbone | AddQuantised) -> Digest:
        """Ask the worker to record a file; return the digest of the file to use, which may be an earlier one."""
        digest = self._channel.ask(question, DigestAnswer).digest
        assert digest is not None, "The worker returned no file right after one was recorded. This is a bug."
        return digest
