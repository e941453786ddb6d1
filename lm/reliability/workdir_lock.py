"""Lock on a run's folder: two processes that train there would cut each other's files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lm.exit_codes import RunError
from lm.storage import lease

LOCK_FILE = "lock"


class WorkdirLocked(RunError):
    """Another process trains in the run's folder."""


@contextlib.contextmanager
def lock_workdir(workdir: str, *, active: bool = True) -> Iterator[None]:
    """Hold the lock of the run's folder (`lm.storage.lease.lock`), in an `active` process.

    Raises:
        WorkdirLocked: another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            if active:
                stack.enter_context(lease.lock(f"{workdir}/{LOCK_FILE}"))
        except lease.Locked as error:
            raise WorkdirLocked(
                f"{workdir}: {error} trains there; wait until it ends, or give another --workdir"
            ) from None
        yield
