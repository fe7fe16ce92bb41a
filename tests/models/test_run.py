from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import records
from records import PRINCIPAL, digest
from sqlalchemy.orm import Session

from errors import Crashed, NotFound
from models import run as runs
from models.project import Principal
from models.run import FINAL_PART, EventKind, Run, RunState
from models.session import Database
from recipes.recipe import Recipe

CHANGES: dict[str, Callable[[Session, str], object]] = {
    "running": runs.start_run,
    "succeeded": lambda session, run_id: runs.succeed_run(session, run_id, {}, 1.0),
    "failed": lambda session, run_id: runs.fail_run(session, run_id, {}),
    "cancelled": runs.cancel_run,
}
AGAIN = {"queued": runs.reopen_run}


def new_run(session: Session) -> Run:
    return records.queued_run(session, records.ready_version(session))


def test_a_run_begins_queued_with_its_whole_recipe(database: Database) -> None:
    with database.writing() as session:
        run_id = new_run(session).id
    with database.reading() as session:
        run = runs.get_run(session, PRINCIPAL, run_id)
        assert run.state is RunState.QUEUED and not run.state.is_final
        assert Recipe.model_validate(run.recipe) == records.RECIPE
        assert run.progress == runs.progress(stage="queued")
        assert (run.started_at, run.finished_at, run.metrics, run.error) == (None, None, None, None)


def test_nobody_finds_a_run_of_another_project(database: Database) -> None:
    with database.writing() as session:
        run = new_run(session)
        with pytest.raises(NotFound, match=run.id):
            runs.get_run(session, Principal("prj_other"), run.id)
        with pytest.raises(NotFound, match="run_0"):
            runs.get_run(session, PRINCIPAL, "run_0")


WAYS: list[tuple[list[str], list[str]]] = [
    ([], ["succeeded"]),
    (["running"], ["running"]),
    (["running", "succeeded"], [*CHANGES]),
    (["running", "failed"], [*CHANGES]),
    (["failed"], [*CHANGES]),
    (["running", "failed", "queued"], ["succeeded"]),
    (["cancelled"], [*CHANGES]),
    (["running", "cancelled"], [*CHANGES]),
]


def test_a_run_goes_only_where_it_may(database: Database) -> None:
    with database.writing() as session:
        version = records.ready_version(session)

    def change(run_id: str, step: str) -> None:
        with database.writing() as session:
            (CHANGES | AGAIN)[step](session, run_id)

    for way, refused in WAYS:
        with database.writing() as session:
            run_id = records.queued_run(session, version).id
        for step in way:
            change(run_id, step)
        state = way[-1] if way else "queued"
        for step in refused:
            with pytest.raises(RuntimeError, match=f"cannot go from {state} to {step}"):
                change(run_id, step)
        with database.reading() as session:
            run = runs.get_run(session, PRINCIPAL, run_id)
            assert run.state == state
            assert run.state.is_final == (run.finished_at is not None)
            assert [event.payload["state"] for event in runs.get_events(session, run_id, after=0)] == ["queued", *way]


def test_a_lost_run_waits_again_and_goes_on_with_the_folds_it_has(database: Database) -> None:
    with database.writing() as session:
        run_id = records.running_run(session, records.ready_version(session)).id
        began_at = runs.get_run(session, PRINCIPAL, run_id).started_at
        runs.add_fold(session, records.fold(run_id))
        runs.set_progress(session, run_id, runs.progress(stage="fit", fraction=0.5))
    with database.writing() as session:
        runs.requeue_run(session, run_id)
    with database.writing() as session:
        run = runs.get_run(session, PRINCIPAL, run_id)
        assert (run.state, run.started_at, run.progress) == (RunState.QUEUED, began_at, runs.progress(stage="queued"))
        runs.start_run(session, run_id)
        assert [fold.number for fold in runs.get_folds(session, run_id)] == [0]
        assert run.started_at == began_at
        states = [event.payload["state"] for event in runs.get_events(session, run_id, 0) if event.kind == "state"]
        assert states == ["queued", "running", "queued", "running"]


def test_a_run_that_was_lost_before_it_began_just_waits_on(database: Database) -> None:
    with database.writing() as session:
        run_id = new_run(session).id
        runs.requeue_run(session, run_id)
    with database.writing() as session:
        assert [event.payload["state"] for event in runs.get_events(session, run_id, 0)] == ["queued"]
        runs.start_run(session, run_id)


def test_a_closed_run_is_not_queued_again(database: Database) -> None:
    with database.writing() as session:
        run_id = new_run(session).id
        runs.cancel_run(session, run_id)
    with pytest.raises(RuntimeError, match="cannot go from cancelled to queued"), database.writing() as session:
        runs.requeue_run(session, run_id)


def test_a_closed_run_says_what_came_out(database: Database) -> None:
    error = Crashed("The process ended with SIGSEGV.").record()
    with database.writing() as session:
        version = records.ready_version(session)
        good, bad = records.running_run(session, version), records.running_run(session, version)
        runs.succeed_run(session, good.id, {"accuracy": 0.9}, 1.0)
        runs.fail_run(session, bad.id, error)
    with database.reading() as session:
        run = runs.get_run(session, PRINCIPAL, good.id)
        assert (run.metrics, run.training_s) == ({"accuracy": 0.9}, 1.0)
        assert run.progress == runs.progress(stage="done", fraction=1.0)
        assert runs.get_run(session, PRINCIPAL, bad.id).error == error
        last = runs.get_events(session, bad.id, after=0)[-1]
        assert last.payload == {"state": "failed", "error": error}


def test_events_are_numbered_without_a_gap(database: Database) -> None:
    with database.writing() as session:
        run_id = new_run(session).id
    with database.writing() as session:
        runs.start_run(session, run_id)
        runs.add_event(session, run_id, EventKind.EPOCH, {"epoch": 1})

    def fail_half_way() -> None:
        with database.writing() as session:
            runs.add_event(session, run_id, EventKind.EPOCH, {"epoch": 2})
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    with database.writing() as session:
        runs.set_progress(session, run_id, runs.progress(stage="fit", epoch=2))
        runs.add_fold(session, records.fold(run_id))
        runs.succeed_run(session, run_id, {}, 1.0)
    with database.reading() as session:
        events = runs.get_events(session, run_id, after=0)
        assert [event.seq for event in events] == [1, 2, 3, 4, 5, 6]
        assert [event.kind for event in events] == ["state", "state", "epoch", "progress", "fold", "state"]
        assert events[4].payload == {"fold": 0, "epochs": 9, "best_epoch": 4, "metrics": {"loss": 1.0}}
        assert [event.seq for event in runs.get_events(session, run_id, after=4)] == [5, 6]
        assert [event.seq for event in runs.get_events(session, run_id, after=1, limit=2)] == [2, 3]


def test_a_run_that_two_hands_close_at_once_is_closed_once(database: Database) -> None:
    with database.writing() as session:
        run_id = records.running_run(session, records.ready_version(session)).id

    def close(step: str) -> str:
        try:
            with database.writing() as session:
                CHANGES[step](session, run_id)
        except RuntimeError:
            return "refused"
        return step

    with ThreadPoolExecutor(4) as pool:
        outcomes = sorted(pool.map(close, ["succeeded", "failed", "cancelled", "succeeded"]))
    assert outcomes.count("refused") == 3
    with database.reading() as session:
        assert [event.seq for event in runs.get_events(session, run_id, after=0)] == [1, 2, 3]
        assert runs.get_run(session, PRINCIPAL, run_id).state in outcomes


def test_a_run_is_active_until_it_is_closed(database: Database) -> None:
    with database.writing() as session:
        version = records.ready_version(session)
        other = records.ready_version(session, "other")
        assert not runs.is_any_active(session, [version.id, other.id])
        run = records.queued_run(session, version)
        assert runs.is_any_active(session, [version.id]) and not runs.is_any_active(session, [other.id])
        runs.start_run(session, run.id)
        assert runs.is_any_active(session, [other.id, version.id])
        runs.cancel_run(session, run.id)
        assert not runs.is_any_active(session, [version.id, other.id])


def test_a_failed_run_that_is_opened_again_keeps_the_folds_that_its_end_can_use(database: Database) -> None:
    with database.writing() as session:
        run_id = records.running_run(session, records.ready_version(session)).id
        runs.add_fold(session, records.fold(run_id, 0, outcome_sha256=digest("outcome")))
        runs.add_fold(session, records.fold(run_id, 1))  # as an older version wrote them
        runs.fail_run(session, run_id, Crashed("It died.").record())
    with database.writing() as session:
        run = runs.reopen_run(session, run_id)
        assert (run.state, run.error, run.finished_at) == (RunState.QUEUED, None, None)
        assert [fold.number for fold in runs.get_folds(session, run_id)] == [0]


def test_the_last_two_checkpoints_of_each_part_are_kept(database: Database) -> None:
    def add(session: Session, part: int, epochs: int) -> list[str]:
        name = digest(f"part {part} epoch {epochs}")
        return [*runs.add_checkpoint(session, run_id, part, epochs, name, 10)]

    with database.writing() as session:
        run_id = new_run(session).id
        assert [add(session, 0, epochs) for epochs in (1, 2, 2, 3)] == [[], [], [], [digest("part 0 epoch 1")]]
        assert add(session, FINAL_PART, 1) == []
    with database.writing() as session:
        kept = [digest("part 0 epoch 3"), digest("part 0 epoch 2")]
        assert runs.get_checkpoints(session, run_id) == {0: kept, FINAL_PART: [digest("part -1 epoch 1")]}
        assert sorted(runs.drop_checkpoints(session, run_id, 0)) == sorted(kept)
        assert runs.get_checkpoints(session, run_id) == {FINAL_PART: [digest("part -1 epoch 1")]}


def test_what_only_the_end_of_a_run_needs_of_its_folds_can_be_forgotten(database: Database) -> None:
    with database.writing() as session:
        run_id = new_run(session).id
        for number in (0, 1):
            runs.add_fold(session, records.fold(run_id, number, outcome_sha256=digest(f"outcome {number}")))
        assert runs.drop_outcomes(session, run_id) == [digest("outcome 0"), digest("outcome 1")]
        assert runs.drop_outcomes(session, run_id) == []
        assert len(runs.get_folds(session, run_id)) == 2


def test_a_file_of_a_run_replaces_the_one_of_its_name(database: Database) -> None:
    with database.writing() as session:
        run_id = new_run(session).id
        runs.add_artifact(session, run_id, "report.json", digest("first"), 10, "application/json")
        runs.add_artifact(session, run_id, "confusion.png", digest("picture"), 20, "image/png")
    with database.writing() as session:
        runs.add_artifact(session, run_id, "report.json", digest("second"), 30, "application/json")
    with database.reading() as session:
        files = [(file.name, file.sha256, file.size_bytes) for file in runs.get_artifacts(session, run_id)]
        assert files == [("confusion.png", digest("picture"), 20), ("report.json", digest("second"), 30)]


def test_what_was_computed_is_kept_from_the_first_attempt_and_its_longest_time(database: Database) -> None:
    told = [
        {"images": 9, "computed": 9, "cached": 0, "seconds": 2.0},
        {"images": 9, "computed": 9, "cached": 0, "seconds": 5.0},
        {"images": 9, "computed": 0, "cached": 9, "seconds": 0.5},
    ]
    with database.writing() as session:
        run_id = new_run(session).id
    for extraction in told:
        with database.writing() as session:
            runs.record_extraction(session, run_id, extraction)
    with database.reading() as session:
        assert runs.get_run(session, PRINCIPAL, run_id).extraction == told[1]
