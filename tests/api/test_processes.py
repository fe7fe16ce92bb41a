"""How a machine is divided among several API processes."""

from __future__ import annotations

import pytest

from api.processes import divided, shares
from settings import Settings


def test_threads_and_memory_are_divided_and_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in divided(Settings(api_processes=3, threads=8, shelf_bytes=3000)).items():
        monkeypatch.setenv(name, value)
    found = Settings()
    assert (found.api_processes, found.engine_threads, found.shelf_bytes) == (1, 2, 1000)


def test_every_process_has_a_thread_and_some_memory() -> None:
    found = divided(Settings(api_processes=64, threads=2, shelf_bytes=1))
    assert (found["ESPALIER_THREADS"], found["ESPALIER_SHELF_BYTES"]) == ("1", "1")


@pytest.mark.parametrize(("processors", "count"), [(2, 2), (8, 3), (64, 5), (1, 1)])
def test_every_processor_belongs_to_one_process(processors: int, count: int) -> None:
    numbers = [2 * number for number in range(processors)]  # some may be another container's
    found = shares(numbers, count)
    assert sorted(number for share in found for number in share) == numbers
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_more_processes_than_processors_take_turns() -> None:
    assert sorted(map(sorted, shares([3, 7], 4))) == [[3], [3], [7], [7]]
