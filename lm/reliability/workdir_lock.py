"""Lock on a run's folder: two processes that train there would cut each other's files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lm.exit_codes import RunError

LOCK_FILE = "lock"
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # errors of file systems without locks


class WorkdirLocked(RunError):
    """Another process trains in the run's folder."""


@contextlib.contextmanager
def lock_workdir(workdir: str, *, active: bool = True) -> Iterator[None]:
    """Hold the lock of the run's folder.

    It is the kernel's (flock) and ends with the process, however that ends. Object stores and some
    network file systems have none.

    Raises:
        WorkdirLocked: another process holds it.
    """
    if not active or "://" in workdir:
        yield
        return
    path = Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise WorkdirLocked(
                f"{workdir}: {file.read() or 'another process'} trains there; wait until it ends, "
                "or give another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
