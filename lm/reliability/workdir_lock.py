"""Lock on a run's folder: two processes that train there would cut each other's files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lm.exit_codes import Exit, RunError
from lm.storage import lease

LOCK_FILE = "lock"


class WorkdirLocked(RunError):
    """Another process trains in the run's folder."""


class LockLost(RunError):
    """Another process has taken over the run's folder."""

    code = Exit.LOCK_LOST


class WorkdirLock(lease.Lock):
    """The lock of a run's folder, to be checked before the folder is written."""

    def __init__(self, workdir: str, held: lease.Lock) -> None:
        self._workdir, self._held = workdir, held

    def check(self, *, ask: bool = False) -> None:
        """As `lease.Lock.check`, but raises LockLost."""
        try:
            self._held.check(ask=ask)
        except lease.LeaseLost as error:
            raise LockLost(
                f"{self._workdir}: another process has taken its lock ({error}) and trains there, "
                f"since this one was cut off from the bucket for {lease.SECONDS:g} seconds or more"
            ) from None


@contextlib.contextmanager
def lock_workdir(workdir: str, *, active: bool = True) -> Iterator[WorkdirLock]:
    """Hold the lock of the run's folder (`lm.storage.lease.lock`) in an `active` process.

    Raises:
        WorkdirLocked: another process holds it.
    """
    with contextlib.ExitStack() as stack:
        held = lease.Lock()
        try:
            if active:
                held = stack.enter_context(lease.lock(f"{workdir}/{LOCK_FILE}"))
        except lease.Locked as error:
            raise WorkdirLocked(
                f"{workdir}: {error} trains there; wait until it ends, or give another --workdir"
            ) from None
        yield WorkdirLock(workdir, held)
