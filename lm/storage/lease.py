"""Locks on folders: the kernel's on a local disk, leases in buckets."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

from lm.storage import files
from lm.storage.paths import is_url

SECONDS = 60.0  # a lease that was not renewed for as long is lost
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without locks


class Locked(Exception):
    """Another process holds the lock; the message names it."""


@contextlib.contextmanager
def lock(path: str) -> Iterator[None]:
    """Hold a lock named by a file.

    On a local disk it is flock's, and ends with the process, however that ends. In a bucket it is a
    lease, `PATH/NUMBER`: an object that its holder rewrites every `SECONDS / 4`. The next holder
    creates the next number, which one of many can. A dead holder's lease is lost after `SECONDS`,
    and at once to a process of its own machine. Clocks of machines may differ by seconds. A holder
    that was cut off for longer than `SECONDS` is not stopped when another one has come.

    Raises:
        Locked: another process holds it.
    """
    with _lease(path) if is_url(path) else _flock(path):
        yield


@contextlib.contextmanager
def _flock(path: str) -> Iterator[None]:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Locked(file.read() or "another process") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextlib.contextmanager
def _lease(folder: str) -> Iterator[None]:
    number = _take(folder)
    path, released = f"{folder}/{number:08d}", threading.Event()

    def renew() -> None:
        while not released.wait(SECONDS / 4):
            with contextlib.suppress(OSError):
                files.write_atomically(path, _holder())

    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        files.write_atomically(path, json.dumps({"released": True}))


def _holder() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()})


def _take(folder: str) -> int:
    """Create the next number once the last one is released or lost, and return it."""
    numbers = [int(name) for name in files.list_names(folder) if name.isdigit()]
    last = max(numbers, default=0)
    if numbers:
        try:
            holder = json.loads(files.read_bytes(f"{folder}/{last:08d}"))
        except FileNotFoundError:  # its successor has just deleted it
            raise Locked("a process that began at the same moment") from None
        left = _seconds_left(holder)
        if left > 0:
            raise Locked(
                f"process {holder['pid']} on {holder['host']} (or, if it is dead, nobody in "
                f"{left:.0f} seconds)"
            )
    if not files.create(f"{folder}/{last + 1:08d}", _holder()):
        raise Locked("a process that began at the same moment")
    for number in numbers:
        files.delete(f"{folder}/{number:08d}")
    return last + 1


def _seconds_left(holder: dict[str, object]) -> float:
    """Return for how long the lease of a holder holds."""
    if holder.get("released"):
        return 0.0
    if holder["host"] == socket.gethostname() and not os.path.exists(f"/proc/{holder['pid']}"):
        return 0.0
    return float(str(holder["time"])) + SECONDS - time.time()
