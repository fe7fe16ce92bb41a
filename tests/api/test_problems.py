from __future__ import annotations

from api.problems import TABLE, TYPE_PREFIX, problem, stored_problem
from errors import EspalierError, RecipeInvalid, errors_by_code


def test_every_error_stands_in_the_table_with_a_code_of_its_own() -> None:
    def tree(kind: type[EspalierError]) -> set[type[EspalierError]]:
        return {kind}.union(*(tree(child) for child in kind.__subclasses__()))

    mine = {kind for kind in tree(EspalierError) if kind.__module__ == "errors"}
    assert mine == TABLE.keys()
    assert len({kind.code for kind in mine}) == len(mine)
    assert all(400 <= status < 600 for status in TABLE.values())


def test_a_problem_keeps_what_the_error_knows() -> None:
    found = problem(RecipeInvalid("folds.k", "Too many.", most=3).record())
    assert found == {
        "type": TYPE_PREFIX + "recipe-invalid",
        "title": "Recipe invalid",
        "status": 422,
        "detail": "Too many.",
        "field": "folds.k",
        "most": 3,
    }


def test_a_stored_error_of_an_unknown_kind_is_still_a_problem() -> None:
    assert stored_problem(None) is None
    found = stored_problem({"code": "of-a-later-version", "detail": "x"})
    assert found is not None and found["status"] == 500
    assert "internal" in errors_by_code()
