from __future__ import annotations

from pathlib import Path

from worker.oom_kills import count_kills

VMSTAT = "nr_free_pages 3\noom_kill 2\nzone_reclaim_failed 0\n"
EVENTS = "low 0\nhigh 0\nmax 7\noom 5\noom_kill 1\noom_group_kill 0\n"


def test_kills_are_counted_wherever_the_kernel_tells_of_them(tmp_path: Path) -> None:
    machine, group, absent = (tmp_path / name for name in ("vmstat", "memory.events", "memory.oom_control"))
    machine.write_text(VMSTAT)
    assert count_kills([machine, group, absent]) == 2
    group.write_text(EVENTS)
    assert count_kills([machine, group, absent]) == 3


def test_where_nothing_is_told_nothing_is_counted(tmp_path: Path) -> None:
    (tmp_path / "strange").write_text("oom_kill many\n")
    assert count_kills([tmp_path / "absent", tmp_path / "strange"]) == 0
