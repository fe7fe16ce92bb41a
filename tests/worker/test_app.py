from __future__ import annotations

import os
import time
from pathlib import Path

from waiting import until

from models.job import Queue
from models.session import Database
from ops.migrate import upgrade
from settings import Settings
from worker.app import WorkerService


def test_a_worker_that_starts_clears_away_what_killed_ones_left_half_written(tmp_path: Path) -> None:
    settings = Settings(var=tmp_path)
    database = Database(settings.database)
    upgrade(database)
    database.close()
    service = WorkerService(settings, "here", [Queue.INGEST])
    left = tmp_path / "store" / "incoming" / "left"
    left.write_bytes(b"half a file")
    yesterday = time.time() - 90_000
    os.utime(left, (yesterday, yesterday))
    service.start()
    until(lambda: not left.exists())
    service.stop()
