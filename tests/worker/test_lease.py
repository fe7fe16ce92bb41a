from __future__ import annotations

import psutil
from waiting import until

from worker.child_process import Child
from worker.lease import WarmChild


def is_gone(child: Child) -> bool:
    return not psutil.pid_exists(child.pid) or psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE


def test_a_child_is_kept_for_its_subject_and_stopped_for_any_other() -> None:
    warm_child = WarmChild()
    child = Child()
    warm_child.keep("run_1", child)
    warm_child.clear(but="run_1")
    assert child.is_alive
    assert warm_child.take("run_1") is child
    assert warm_child.take("run_1") is None, "it is the taker's now"

    warm_child.keep("run_1", child)
    assert warm_child.take("run_2") is None
    assert is_gone(child)


def test_a_child_that_was_killed_while_it_waited_is_not_handed_over() -> None:
    warm_child = WarmChild()
    child = Child()
    warm_child.keep("run_1", child)
    psutil.Process(child.pid).kill()
    until(lambda: not child.is_alive)
    assert warm_child.take("run_1") is None
