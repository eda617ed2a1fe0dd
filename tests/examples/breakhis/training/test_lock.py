import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
from pathlib import Path

import pytest
from breakhis.training.lock import LOCK, lock_folder

from tests.support.locks import lock_holder, start

RACE = """
import sys
from pathlib import Path
from breakhis.training.lock import lock_folder
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock_folder(Path(sys.argv[1])):
        print("locked", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""
FORK = """
import os, sys, time
from pathlib import Path
from breakhis.training.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(f"locked\\n{child}", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_and_the_first_is_named(tmp_path):
    folder = tmp_path / "new" / "folder"
    with lock_holder(folder) as process:
        owner = rf"process {process.pid} on {socket.gethostname()}, since \d+-"
        message = rf"--output-dir {folder} must not be in use, but {owner}"
        for _ in range(3):
            with pytest.raises(ValueError, match=message), lock_folder(folder):
                pass
        assert (folder / LOCK).is_file()
    assert list(folder.iterdir()) == []
    with lock_folder(folder), lock_folder(tmp_path / "another"):
        record = json.loads((folder / LOCK).read_text())
        assert (record["pid"], record["host"]) == (os.getpid(), socket.gethostname())


def test_the_file_is_removed_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock_folder(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_run_that_was_killed_is_taken_over(tmp_path):
    with lock_holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
        with lock_folder(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_number_of_a_process_that_was_given_again_does_not_block(tmp_path):
    """The file names a process that lives, but is not the one that wrote it."""
    owner = {"pid": os.getppid(), "host": socket.gethostname(), "started": "2026-01-01 00:00:00"}
    (tmp_path / LOCK).write_text(json.dumps(owner))
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff\xff", b"[]", b'{"pid": 1}', b"3"])
def test_a_file_that_names_nobody_does_not_block(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_the_lock_of_another_machine_is_refused_with_the_file_to_delete(tmp_path):
    path, owner = tmp_path / LOCK, {"pid": 7, "host": "elsewhere", "started": "2026-01-01 00:00:00"}
    path.write_text(json.dumps(owner))
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"process 7 on elsewhere, .* has left a lock; .* delete {path}$"):
            lock_folder(tmp_path).__enter__()
    assert json.loads(path.read_text()) == owner
    path.unlink()
    with lock_folder(tmp_path):
        pass


def test_of_two_that_take_over_at_once_one_gets_the_lock(tmp_path):
    with lock_holder(tmp_path) as dead:
        dead.kill()
    racers = [start(RACE, tmp_path) for _ in range(6)]
    for process in racers:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.stdout.readline() for process in racers]
    for process in racers:
        process.communicate(timeout=30)
    assert answers.count("locked\n") == 1
    assert sum("must not be in use" in answer for answer in answers) == 5
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_owner_removes_between_opening_and_locking_is_not_locked(tmp_path, monkeypatch):
    """Else two runs would hold a lock: one of the removed file, one of the new file."""
    path, calls, lockf = tmp_path / LOCK, [], fcntl.lockf

    def remove_then_lock(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
        return lockf(descriptor, operation)

    monkeypatch.setattr(fcntl, "lockf", remove_then_lock)
    with lock_folder(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert len(calls) == 2


def bind_socket(path: Path) -> None:
    """Leave a socket, whose own path must be short."""
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda path: path.symlink_to(path.with_name("precious")), "a symbolic link"),
        (lambda path: path.symlink_to(path.with_name("none")), "a symbolic link"),
        (lambda path: path.symlink_to(path), "a symbolic link"),
        (lambda path: path.symlink_to("/dev/null"), "a symbolic link"),
        (lambda path: path.hardlink_to(path.with_name("precious")), "a file with other names"),
        (Path.mkdir, "Is a directory"),
        (os.mkfifo, "a pipe or a device"),
        (bind_socket, "No such device or address|Operation not supported on socket"),
    ],
    ids=["link", "broken link", "link to itself", "link to a device", "hard link", "directory", "pipe", "socket"],
)
def test_only_a_plain_file_is_locked(tmp_path, make, got):
    """In one line that names the file, and at once: opening a pipe can wait for ever."""
    (tmp_path / "precious").write_text("content")
    make(tmp_path / LOCK)
    before = {path.name: path.lstat().st_ino for path in tmp_path.iterdir()}
    message = rf"^{tmp_path / LOCK} must be a plain file that can be written, got: ({got})$"
    with pytest.raises(OSError, match=message):
        lock_folder(tmp_path).__enter__()
    assert {path.name: path.lstat().st_ino for path in tmp_path.iterdir()} == before
    assert (tmp_path / "precious").read_text() == "content"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch, number):
    """The administrator may write any file, so the error of the system is put in its place."""

    def fail(*args):
        raise OSError(number, os.strerror(number), str(tmp_path / LOCK))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match=rf"^{tmp_path / LOCK} must be a plain file .*, got: {os.strerror(number)}$"):
        lock_folder(tmp_path).__enter__()


def test_a_file_system_without_locks_is_refused_by_name(tmp_path, monkeypatch):
    def fail(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(OSError, match=rf"--output-dir {tmp_path} must be on a file system with locks: .*No locks"):
        lock_folder(tmp_path).__enter__()


def test_a_process_that_loads_images_does_not_keep_the_lock(tmp_path):
    """Such a process is forked, and outlives a run that is killed by some seconds."""
    process = start(FORK, tmp_path)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    with lock_folder(tmp_path):
        os.kill(child, 0)  # it lives
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    os.kill(child, signal.SIGKILL)
    process.communicate()
