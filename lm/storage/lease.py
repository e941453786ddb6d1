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
from typing import TextIO

from lm.storage import files
from lm.storage.paths import is_url

SECONDS = 60.0  # a lease that was not renewed for as long is lost
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without locks


class Locked(Exception):
    """Another process holds the lock; the message names it."""


class LeaseLost(Exception):
    """Another process has taken the lock, which this one could not renew in time."""


class Lock:
    """A lock that is held. The kernel's cannot be lost."""

    def check(self, *, ask: bool = False) -> None:
        """Raise LeaseLost if another process is known to have taken the lock.

        ask: read the bucket now, as before a write that must not meet another holder's; else what
        the last renewal found, without waiting.
        """


@contextlib.contextmanager
def lock(path: str) -> Iterator[Lock]:
    """Hold a lock named by a file.

    On a local disk it is flock's, and ends with the process, however that ends. In a bucket it is a
    lease, `PATH/NUMBER`: an object that its holder rewrites every `SECONDS / 4`. The next holder
    creates the next number, which one of many can. A dead holder's lease is lost after `SECONDS`,
    and at once to a process of its own machine. Clocks of machines may differ by seconds. A holder
    that was cut off for longer than `SECONDS` finds the next number at its next renewal, and at
    once where it asks.

    Raises:
        Locked: another process holds it.
    """
    with _lease(path) if is_url(path) else _flock(path) as held:
        yield held


@contextlib.contextmanager
def _flock(path: str) -> Iterator[Lock]:
    folder = os.path.dirname(path) or "."
    made = not os.path.isdir(folder)
    with _open_locked(path) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield Lock()
        finally:
            if os.listdir(folder) == [os.path.basename(path)]:  # nothing came of it
                os.unlink(path)
                if made:
                    os.rmdir(folder)


def _open_locked(path: str) -> TextIO:
    """The file, locked. Raises Locked."""
    while True:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - closed by the caller, or below
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise Locked(_name(file)) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                file.close()
                raise
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            return file
        file.close()  # its last holder has deleted it in between


def _name(file: TextIO) -> str:
    """The holder's name, which it writes a moment after it has locked the file."""
    for _ in range(100):
        file.seek(0)
        if name := file.read():
            return name
        time.sleep(0.01)
    return "another process"


class _Lease(Lock):
    """The lease `FOLDER/NUMBER`, which a thread renews until it is released."""

    def __init__(self, folder: str) -> None:
        self._folder, self._number = folder, _take(folder)
        self._path = f"{folder}/{self._number:08d}"
        self._released, self._successor = threading.Event(), 0
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def _renew(self) -> None:
        while not self._released.wait(SECONDS / 4):
            with contextlib.suppress(OSError):
                self._look()
                if self._successor:
                    return
                files.write_atomically(self._path, _holder())

    def _look(self) -> None:
        last = max(_numbers(self._folder), default=self._number)
        if last > self._number:
            self._successor = last

    def check(self, *, ask: bool = False) -> None:
        if ask and not self._successor:
            self._look()
        if self._successor:
            raise LeaseLost(f"{self._folder}/{self._successor:08d}")

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if not self._successor:
            files.write_atomically(self._path, json.dumps({"released": True}))


@contextlib.contextmanager
def _lease(folder: str) -> Iterator[Lock]:
    held = _Lease(folder)
    try:
        yield held
    finally:
        held.release()


def _holder() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()})


def _numbers(folder: str) -> list[int]:
    return [int(name) for name in files.list_names(folder) if name.isdigit()]


def _take(folder: str) -> int:
    """Create the next number once the last one is released or lost, and return it."""
    numbers = _numbers(folder)
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
