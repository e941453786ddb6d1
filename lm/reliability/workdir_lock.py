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


@contextlib.contextmanager
def lock_workdir(workdir: str, *, active: bool = True) -> Iterator[lease.Lock]:
    """Hold the lock of the run's folder (`lm.storage.lease.lock`), in an `active` process, and
    yield it, to be checked before the folder is written.

    Raises:
        WorkdirLocked: another process holds it.
        LockLost: another process has taken it, as a check in the context found.
    """
    held = lease.Lock()
    with contextlib.ExitStack() as stack:
        try:
            if active:
                held = stack.enter_context(lease.lock(f"{workdir}/{LOCK_FILE}"))
        except lease.Locked as error:
            raise WorkdirLocked(
                f"{workdir}: {error} trains there; wait until it ends, or give another --workdir"
            ) from None
        try:
            yield held
        except lease.LeaseLost as error:
            raise LockLost(
                f"{workdir}: another process has taken its lock ({error}) and trains there, since "
                f"this one was cut off from the bucket for {lease.SECONDS:g} seconds or more"
            ) from None
