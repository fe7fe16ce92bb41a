from __future__ import annotations

from inference.stopwatch import medians_ms


def test_each_call_gets_the_median_of_its_warm_rounds_and_rounds_are_interleaved() -> None:
    clock, order = [0.0], []

    def call(name: str, *seconds: float) -> None:
        order.append(name)
        clock[0] += seconds[order.count(name) - 1]

    found = medians_ms(
        [lambda: call("a", 9.0, 0.001, 0.003, 0.002), lambda: call("b", 9.0, 0.5, 0.5, 0.5)], 3, now=lambda: clock[0]
    )
    assert [round(value, 6) for value in found] == [2.0, 500.0]
    assert "".join(order) == "abababab"
