from __future__ import annotations

import array
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import sample
from structlog.testing import capture_logs
from waiting import until
from working import add_job, claimed_work, slow_jpeg

from artifacts.archive import ArchiveLimits
from artifacts.images import ImageLimits
from artifacts.store import Digest, Store, digest_of
from errors import ArchiveRefused, Corrupt, Crashed, DiskFull, EspalierError, LayoutUnknown, NotFound, OutOfMemory
from models.session import Database
from recipes.recipe import Task
from worker import child_process
from worker.child_process import Child, ChildDied, clear_left_folders, messages
from worker.lease import Reason, Stopped, Work
from worker.messages import (
    Alive,
    ChildMessage,
    DigestAnswer,
    ImageAccepted,
    ImageBegun,
    ImageRejected,
    IngestOrder,
    LayoutFound,
    line_of,
)

MIB = 1024 * 1024
ROOT = Path(__file__).parent.parent.parent

MakeOrder = Callable[..., IngestOrder]
Sidecar = Callable[[str], dict[str, str]]


@pytest.fixture
def work(sqlite: Database) -> Iterator[Work]:
    """A job that is held."""
    add_job(sqlite)
    with claimed_work(sqlite) as work:
        yield work


@pytest.fixture
def order(store: Store) -> MakeOrder:
    """Order the ingest of an archive, given as its bytes or as a digest."""

    def make(archive: bytes | Digest, memory_bytes: int = 1536 * MIB) -> IngestOrder:
        return IngestOrder(
            store=str(store.root),
            archive=archive if isinstance(archive, str) else store.put(archive),
            archive_limits=ArchiveLimits(),
            image_limits=ImageLimits(scans=100_000),  # so that an image may take long
            decode_cpu_s=100,
            memory_bytes=memory_bytes,
            done=(),
        )

    return make


@pytest.fixture
def endless(store: Store, order: MakeOrder) -> IngestOrder:
    """An order that takes for ever and burns nothing: its archive is a pipe that nobody writes to."""
    digest = digest_of(b"endless")
    store.path_for(digest).parent.mkdir()
    os.mkfifo(store.path_for(digest))
    return order(digest)


@pytest.fixture
def sidecar(tmp_path: Path) -> Sidecar:
    """Return an environment in which every Python runs this code before anything else, as a library might."""

    def make(code: str) -> dict[str, str]:
        folder = tmp_path / "sidecar"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": str(folder), "SIDECAR": str(folder)}

    return make


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listen(child: Child, work: Work) -> list[ChildMessage]:
    """Return all that a child says until it is done."""
    return list(messages(child, work))


def next_message(child: Child, work: Work) -> ChildMessage:
    """Wait for a child's next message."""
    while (message := child.receive(work)) is None:
        pass
    return message


# --- what a child says -----------------------------------------------------------------------------------------------


def test_a_child_says_everything_and_then_ends(work: Work, order: MakeOrder) -> None:
    files = sample.coloured(per_class=2)
    with Child(order(sample.zipped(files))) as child:
        layout, *images = listen(child, work)
        assert not is_alive(child.pid)
    assert layout == LayoutFound(
        task=Task.MULTICLASS, samples=6, ignored=0, refused=(), classes={"blue": 2, "green": 2, "red": 2}
    )
    assert [type(message) for message in images] == [ImageBegun, ImageAccepted] * 6
    assert [(image.path, image.sha256) for image in images if isinstance(image, ImageAccepted)] == [
        (path, digest_of(data)) for path, data in files.items()
    ]


@pytest.mark.parametrize(
    ("number", "kills", "meaning"),
    [
        (signal.SIGKILL, [3, 4], OutOfMemory),
        (signal.SIGKILL, [3, 3], Crashed),  # by hand: the kernel did not count it
        (signal.SIGSEGV, [3, 4], Crashed),  # the kernel killed another one meanwhile
    ],
)
def test_a_killed_child_has_said_all_that_came_before(
    work: Work, order: MakeOrder, number: signal.Signals, kills: list[int], meaning: type[EspalierError]
) -> None:
    files = sample.coloured(per_class=2, classes=2) | {"red/slow.jpg": slow_jpeg(20_000)}
    sent: list[ChildMessage] = []
    counted = iter(kills)
    with Child(order(sample.zipped(files, zipfile.ZIP_STORED)), count_kills=lambda: next(counted)) as child:
        while not sent or not isinstance(sent[-1], ImageBegun) or sent[-1].path != "red/slow.jpg":
            sent.append(next_message(child, work))
        os.kill(child.pid, number)
        with pytest.raises(ChildDied, match=f"ended with {number.name}") as death:
            next_message(child, work)
    assert [message.path for message in sent if isinstance(message, ImageAccepted)] == list(files)[:-1]
    failure = death.value.as_failure()
    assert death.value.signal == number
    assert type(failure) is meaning and failure.is_transient is (meaning is Crashed)


def test_messages_that_wait_are_heard_after_the_child_was_killed(work: Work, order: MakeOrder) -> None:
    files = sample.coloured(per_class=2, classes=2) | {"red/slow.jpg": slow_jpeg(20_000)}
    with Child(order(sample.zipped(files, zipfile.ZIP_STORED))) as child:
        until(lambda: child._lines.qsize() == 10)  # it is at the slow one; nobody listened yet
        os.kill(child.pid, signal.SIGKILL)
        heard = [child.receive(work) for _ in range(10)]
        with pytest.raises(ChildDied, match="SIGKILL"):
            next_message(child, work)
    assert [type(message) for message in heard] == [LayoutFound, *[ImageBegun, ImageAccepted] * 4, ImageBegun]


def test_a_child_that_breaks_is_a_crash(work: Work, endless: IngestOrder, sidecar: Sidecar) -> None:
    broken = sidecar("import resource; resource.setrlimit = None")
    with Child(endless, broken) as child, pytest.raises(ChildDied, match="exit status 1") as death:
        next_message(child, work)
    failure = death.value.as_failure()
    assert death.value.signal is None
    assert isinstance(failure, Crashed) and failure.is_transient


def test_an_error_arrives_as_the_class_it_was(work: Work, order: MakeOrder, store: Store) -> None:
    corrupt = store.put(sample.zipped(sample.coloured(1)))
    store.path_for(corrupt).write_bytes(b"flipped")
    wrong: list[tuple[bytes | Digest, type[EspalierError], str]] = [
        (digest_of(b"never stored"), NotFound, "No stored file has the digest"),
        (corrupt, Corrupt, "does not match its digest"),
        (b"just text, but long enough to be read as an archive's head" * 10, ArchiveRefused, "Expected a zip"),
        (sample.zipped({"loose.png": b"x"}), LayoutUnknown, "one folder per class"),
    ]
    for archive, kind, detail in wrong:
        with Child(order(archive)) as child, pytest.raises(kind, match=detail) as raised:
            listen(child, work)
        assert type(raised.value) is kind


def test_a_child_that_may_not_have_the_memory_it_wants_says_so(work: Work, order: MakeOrder) -> None:
    archive = sample.zipped({"a/1.png": bytes(60 * MIB), "b/2.png": b"x"}, zipfile.ZIP_STORED)
    with Child(order(archive, memory_bytes=220 * MIB)) as child, pytest.raises(OutOfMemory, match="more memory"):
        listen(child, work)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_what_libraries_print_is_no_message(
    work: Work, order: MakeOrder, sidecar: Sidecar, capfd: pytest.CaptureFixture[str]
) -> None:
    loud = sidecar(
        """
import os, threading, time
print("a library says hello while it is imported", flush=True)
os.write(1, b"half a line without an end")
def chatter():
    for _ in range(1000):
        print('{"type": "accepted"}', flush=True)
        os.write(1, b"chatter")
        time.sleep(0.001)
threading.Thread(target=chatter, daemon=True).start()
"""
    )
    archive = sample.zipped(sample.coloured(per_class=3))
    with Child(order(archive)) as child:
        quiet = listen(child, work)
    with Child(order(archive), loud) as child:
        assert listen(child, work) == quiet
    assert "a library says hello while it is imported\nhalf a line" in capfd.readouterr().err


def test_a_child_that_dies_in_the_middle_of_a_message_is_heard_to_die(
    work: Work, order: MakeOrder, sidecar: Sidecar
) -> None:
    cut = sidecar(
        """
import os, signal, sys
os.write(int(sys.orig_argv[-1]), b'{"type": "alive"}\\n{"type": "outco')
os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    with Child(order(b""), cut) as child:
        assert next_message(child, work) == Alive()
        with pytest.raises(ChildDied, match="SIGKILL"):
            next_message(child, work)


def test_a_line_that_is_no_message_is_an_error_that_shows_it(work: Work, order: MakeOrder, sidecar: Sidecar) -> None:
    wrong = sidecar(
        """
import os, sys, time
lines = (b'{"type": "ali}', b'{"type": "alive", "step": 1}', b'{"type": "sleepy"}', b'{"type": "alive"}', b'no JSON')
os.write(int(sys.orig_argv[-1]), b"\\n".join(lines) + b"\\n")
time.sleep(600)
"""
    )
    with Child(order(b""), wrong) as child:
        for shown in ("ali}", "step", "sleepy"):
            with pytest.raises(Crashed, match=f"Expected a message.*{shown}"):
                next_message(child, work)
        assert next_message(child, work) == Alive(), "the lines after it are read"
        until(lambda: child._lines.qsize() == 1)
        with capture_logs() as logs:
            assert child.stop() == []
    assert "no JSON" in str(logs)


# --- what a child is given -------------------------------------------------------------------------------------------


def test_a_child_is_given_no_secrets(endless: IngestOrder, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = ("DATABASE_URL", "REDIS_URL", "MLFLOW_TRACKING_URI", "ESPALIER_API_KEY", "ESPALIER_STORE_URL")
    secret += ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD", "HTTPS_PROXY")
    secret += ("A_TOKEN_THAT_NOBODY_THOUGHT_OF", "NVIDIA_API_KEY", "TF_VAR_password")
    for name in (*secret, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    environment = sidecar(
        """
import json, os
with open(os.environ["SIDECAR"] + "/new", "w") as file:
    json.dump(dict(os.environ), file)
os.rename(os.environ["SIDECAR"] + "/new", os.environ["SIDECAR"] + "/environment")
"""
    )
    with Child(endless, environment):
        file = Path(environment["SIDECAR"]) / "environment"
        until(file.exists)
        found = json.loads(file.read_text())
    assert found["OMP_NUM_THREADS"] == "7" and found["PATH"] == os.environ["PATH"]
    assert not found.keys() & set(secret)


@pytest.mark.parametrize("is_killed", [False, True], ids=["ended", "killed"])
def test_what_a_child_left_in_its_temporary_folder_goes_with_it(
    work: Work, endless: IngestOrder, order: MakeOrder, sidecar: Sidecar, is_killed: bool
) -> None:
    environment = sidecar(
        """
import os, tempfile
folder = tempfile.mkdtemp()
open(folder + "/weights.h5", "wb").write(bytes(1000))
with open(os.environ["SIDECAR"] + "/new", "w") as file:
    file.write(folder)
os.rename(os.environ["SIDECAR"] + "/new", os.environ["SIDECAR"] + "/folder")
"""
    )
    file = Path(environment["SIDECAR"]) / "folder"
    with Child(endless if is_killed else order(sample.zipped(sample.coloured(1))), environment) as child:
        until(file.exists)
        folder = Path(file.read_text())
        assert (folder / "weights.h5").exists()
        if is_killed:
            os.kill(child.pid, signal.SIGKILL)
        else:
            listen(child, work)
    assert not folder.exists() and not folder.parent.exists()
    assert folder.parent.parent == Path(tempfile.gettempdir())


def test_what_children_of_a_killed_worker_left_is_cleared_and_that_of_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = (f"espalier-child-{gone.pid}-abc", f"espalier-child-{os.getpid()}-abc", "espalier-child-mine", "other")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.h5").touch()
    clear_left_folders()
    assert {folder.name for folder in tmp_path.iterdir()} == set(names[1:])


def test_a_child_for_which_there_is_no_room_waits_and_one_that_cannot_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_more(*given: Any, **options: Any) -> Any:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", no_more)
        with pytest.raises(Crashed, match="temporarily unavailable") as refused:
            Child()
    assert refused.value.is_transient and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(DiskFull):
        Child()


# --- the end ---------------------------------------------------------------------------------------------------------


def test_stopping_a_child_ends_what_it_started_too(endless: IngestOrder, sidecar: Sidecar) -> None:
    environment = sidecar(GRANDCHILD)
    with Child(endless, environment) as child:
        grandchild = grandchild_of(environment)
        assert is_alive(child.pid) and is_alive(grandchild)
    assert not is_alive(child.pid)
    until(lambda: not is_alive(grandchild))


def test_what_a_child_left_running_ends_with_it(work: Work, order: MakeOrder, sidecar: Sidecar) -> None:
    environment = sidecar(GRANDCHILD)
    with Child(order(sample.zipped(sample.coloured(1))), environment) as child:
        listen(child, work)
        grandchild = grandchild_of(environment)
        assert not is_alive(child.pid) and is_alive(grandchild)
    until(lambda: not is_alive(grandchild))


def test_a_child_that_does_not_want_to_end_is_killed(
    endless: IngestOrder, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert child_process.STOP_GRACE_S < 10, "the time that a cancelled run may take"
    monkeypatch.setattr(child_process, "STOP_GRACE_S", 0.3)
    environment = sidecar("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + GRANDCHILD)
    with Child(endless, environment) as child:
        grandchild_of(environment)
    assert not is_alive(child.pid) and child._process.returncode == -signal.SIGKILL


def test_a_child_ends_when_its_worker_is_killed(endless: IngestOrder, sidecar: Sidecar, tmp_path: Path) -> None:
    environment = sidecar(GRANDCHILD)
    helper = """
import json, sys, time
from worker.child_process import Child
from worker.messages import parse_worker_message
child = Child(parse_worker_message(sys.argv[1]), json.loads(sys.argv[2]))
print(child.pid, flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", helper, line_of(endless), json.dumps(environment)]
    here = os.environ | {"TMPDIR": str(tmp_path)}  # nobody is left to remove the child's own folder
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=here) as worker:
        assert worker.stdout is not None
        child = int(worker.stdout.readline())
        grandchild = grandchild_of(environment)
        assert is_alive(child) and is_alive(grandchild)
        worker.kill()
    until(lambda: not is_alive(child))
    until(lambda: not is_alive(grandchild))


def test_half_an_order_from_a_worker_that_died_ends_the_child(sidecar: Sidecar) -> None:
    incoming, outgoing = os.pipe()
    command = [sys.executable, "-m", "worker.child", str(outgoing)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, pass_fds=(outgoing,), cwd=ROOT, start_new_session=True
    ) as child:
        assert child.stdin is not None
        child.stdin.write(b'{"type": "tr')
        child.stdin.close()
        assert child.wait(60) == -signal.SIGKILL
    os.close(incoming)
    os.close(outgoing)


def unread_bytes(child: Child) -> int:
    """Return how much waits in a child's pipe."""
    found = array.array("i", [0])
    fcntl.ioctl(child._incoming, termios.FIONREAD, found)
    return found[0]


def test_a_stopped_child_hands_over_what_nobody_has_heard(order: MakeOrder) -> None:
    # 3,200 messages: more than wait in the queue, so the child's pipe fills up behind it.
    archive = sample.zipped({f"{name}/{number}.png": b"no image" for name in "ab" for number in range(800)})
    with Child(order(archive)) as child:
        until(lambda: child._lines.full() and unread_bytes(child) > 16_384)
        unread = child.stop()
        assert not is_alive(child.pid)
        assert child.stop() == []
    assert isinstance(unread[0], LayoutFound) and 1100 < len(unread) < 3200
    assert [type(message) for message in unread[1:5]] == [ImageBegun, ImageRejected] * 2


def test_a_job_that_must_stop_stops_listening(sqlite: Database, endless: IngestOrder) -> None:
    add_job(sqlite)
    draining = threading.Event()
    with claimed_work(sqlite, draining) as work, Child(endless) as child:
        threading.Timer(0.2, draining.set).start()
        with pytest.raises(Stopped) as stopped:
            next_message(child, work)  # which would never come
    assert stopped.value.reason is Reason.DRAINING
    assert not is_alive(child.pid)


def test_a_message_to_a_dead_child_is_no_error(work: Work, endless: IngestOrder) -> None:
    with Child(endless) as child:
        os.kill(child.pid, signal.SIGKILL)
        until(lambda: not is_alive(child.pid))
        for _ in range(3):
            child.send(DigestAnswer(digest=None))
        with pytest.raises(ChildDied, match="SIGKILL"):
            next_message(child, work)


GRANDCHILD = """
import os, subprocess, sys
if sys.argv[0] in ("-m", ""):
    started = subprocess.Popen(["sleep", "600"])
    with open(os.environ["SIDECAR"] + "/new", "w") as file:
        file.write(str(started.pid))
    os.rename(os.environ["SIDECAR"] + "/new", os.environ["SIDECAR"] + "/pid")
"""


def grandchild_of(environment: dict[str, str]) -> int:
    """Return the process that a child with this environment started."""
    file = Path(environment["SIDECAR"]) / "pid"
    until(file.exists)
    return int(file.read_text())
