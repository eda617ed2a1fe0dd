"""One run at a time in an output folder: two would mix their files, and score the weights of one as those of the other.

The lock is the kernel's (`fcntl.lockf`, so Linux or macOS). It ends with its process, however that dies, so a folder is
never blocked by a run that was killed, and of two runs that start at once the kernel chooses one. A new process with
the number of a dead owner is not taken for the owner. Processes that load images do not inherit the lock. The content
of the file only names the owner in the message.

Some file systems that several machines share do not pass a lock on to the others. A file that another machine has left
is therefore never taken over: the user decides.
"""

import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

LOCK = "run.lock"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if needed. The file is removed at the end, also after an error.

    A process must not take the lock of one folder twice.

    Raises:
        OSError: The lock file cannot be made or written, or is no plain file; the message names it.
        ValueError: Another run holds the lock, or a run on another machine has left its file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _open_locked(path)
    try:
        owner = _read_owner(descriptor)
        if owner and owner["host"] != socket.gethostname():
            raise ValueError(
                f"--output-dir {folder} must not be in use, but {_words(owner)} has left a lock; "
                f"if that process has ended, delete {path}"
            )
        record = {"pid": os.getpid(), "host": socket.gethostname(), "started": datetime.now().isoformat(" ", "seconds")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(record).encode(), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock ends, so that no other run's file is removed
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open the file, which is made if needed; return the descriptor.

    Raises:
        OSError: The path leads to no plain file, or the file cannot be written.
    """
    try:
        # A link could lead to a file of value, and opening a pipe could wait for another process.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        got = "a symbolic link" if path.is_symlink() else error.strerror
    else:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:  # 0: its owner has just removed it
            return descriptor
        os.close(descriptor)
        got = "a file with other names" if stat.S_ISREG(status.st_mode) else "a pipe or a device"
    raise OSError(f"{path} must be a plain file that can be written, got: {got}")


def _open_locked(path: Path) -> int:
    """Open the file and lock it; return the descriptor."""
    while True:
        descriptor = _open(path)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except (BlockingIOError, PermissionError):  # POSIX allows either one where another process holds the lock
            owner = _words(_read_owner(descriptor))
            os.close(descriptor)
            raise ValueError(f"--output-dir {path.parent} must not be in use, but {owner} runs in it") from None
        except OSError as error:
            os.close(descriptor)
            raise OSError(f"--output-dir {path.parent} must be on a file system with locks: {error}") from error
        os.close(descriptor)  # its owner removed it between our opening and locking; now another file may be there


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open file is the one that a path leads to."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read_owner(descriptor: int) -> dict[str, Any]:
    """Read who wrote the file; return an empty mapping if nobody has, or if it is damaged."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) and owner.keys() == {"pid", "host", "started"} else {}


def _words(owner: dict[str, Any]) -> str:
    """Describe the owner of a lock."""
    return "process {pid} on {host}, since {started},".format(**owner) if owner else "another process"
