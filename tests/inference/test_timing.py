from __future__ import annotations

from inference.timing import medians_ms


def test_each_call_gets_the_median_of_its_warm_rounds_and_rounds_are_interleaved() -> None:
    clock, order = [0.0], []

    def call(name: str, *seconds: float) -> None:
        order.append(name)
        clock[0] += seconds[order.count(name) - 1]

    calls = [lambda: call("a", 9.0, 0.001, 0.003, 0.002), lambda: call("b", 9.0, 0.5, 0.5, 0.5)]
    found = medians_ms(calls, 3, 1e9, now=lambda: clock[0])
    assert [round(value, 6) for value in found] == [2.0, 500.0]
    assert "".join(order) == "abababab"


def test_slow_calls_get_fewer_rounds_but_one_that_counts_and_each_is_a_sign_of_life() -> None:
    clock, alive = [0.0], []

    def call() -> None:
        clock[0] += 40.0

    found = medians_ms([call, call], 30, 60.0, alive=lambda: alive.append(1), now=lambda: clock[0])
    assert found == [40_000.0, 40_000.0]
    assert len(alive) == 4
