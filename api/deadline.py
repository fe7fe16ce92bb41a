"""The deadline of one prediction, from its first byte to its answer. Measures each stage, and does none of the work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from enum import StrEnum
from typing import TypeVar

from errors import DeadlineExceeded

Result = TypeVar("Result")


class Stage(StrEnum):
    """A stage of a prediction that may use up its deadline."""

    BODY = "body"
    LOOKUP = "lookup"
    LOAD = "load"
    DECODER = "decoder"
    DECODE = "decode"
    ENGINE = "engine"
    EXPLAIN = "explain"


# What a stage does, and what its client may do about it.
_WORDS = {
    Stage.BODY: ("receiving the request", "Send fewer or smaller images per request."),
    Stage.LOOKUP: ("finding the model in the database", "Try again in a moment."),
    Stage.LOAD: ("loading the model", "Try again in a moment: the loading goes on."),
    Stage.DECODER: ("waiting for a decoder, which other requests kept busy", "Try again in a moment."),
    Stage.DECODE: ("decoding the images", "Send fewer or smaller images per request."),
    Stage.ENGINE: ("waiting for the engine and its answer", "Try again, or send fewer images at once."),
    Stage.EXPLAIN: ("explaining the answer", "Try again, or send fewer images at once."),
}


class Deadline:
    """The time until which a prediction must be answered, and what its stages have taken of it.

    Attributes:
        until: the end, in seconds of `time.perf_counter`.
        spent_s: seconds of each stage so far.
    """

    def __init__(self, limit_s: float) -> None:
        """Start now; `limit_s` is the number of seconds until the end."""
        self._limit_s = limit_s
        self.until = time.perf_counter() + limit_s
        self.spent_s: dict[Stage, float] = {}

    async def wait(self, stage: Stage, awaitable: Awaitable[Result]) -> Result:
        """Return the result of an awaitable, and count its time for a stage.

        Raises DeadlineExceeded when the time is over, also if the awaitable itself raises it.
        """
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.until - began):
                return await awaitable
        except (TimeoutError, DeadlineExceeded) as error:
            self._count(stage, began)
            began = time.perf_counter()
            raise self._exceeded() from error
        finally:
            self._count(stage, began)

    def _count(self, stage: Stage, began: float) -> None:
        self.spent_s[stage] = self.spent_s.get(stage, 0.0) + time.perf_counter() - began

    def _exceeded(self) -> DeadlineExceeded:
        longest = max(self.spent_s, key=self.spent_s.__getitem__)
        did, advice = _WORDS[longest]
        return DeadlineExceeded(
            f"Expected an answer within {self._limit_s:g} s of the request's first byte. Received none: "
            f"{self.spent_s[longest]:.1f} s went into {did}. {advice}",
            stage=longest.value,
            stages_s={stage.value: round(spent, 3) for stage, spent in self.spent_s.items()},
        )
