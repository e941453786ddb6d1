"""Exit codes of a run, and the base of the errors that carry one.

Codes above 128 are 128 plus a signal's number, as a shell shows them; those of the project lie
where neither shells nor sysexits.h have theirs. This is the one table of them: local.py and sweeps
read it, and `python scripts/launch/exit_codes.py` writes what the launchers in bash and
docs/reliability.md say of it.
"""

from __future__ import annotations

import enum
import signal

RESTARTED = "yes: every launcher does"


class Exit(enum.IntEnum):
    """The codes, each with its meaning and whether the same command, started again, goes on."""

    meaning: str
    again: str

    def __new__(cls, code: int, meaning: str, again: str) -> Exit:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning, member.again = meaning, again
        return member

    SUCCESS = 0, "finished", ""
    ERROR = 1, "a mistake in the config or the files", "after mending it"
    USAGE = 2, "a mistake in the flags", "after mending it"
    OUT_OF_DATA = 40, "out of data: more steps than `train.max_epochs` has", "with more data"
    DIVERGED = (
        41,
        "diverged: a bad step and policy `stop`, or `guard.max_skips` in a row",
        "look first",
    )
    HUNG = 42, "hung: no progress within a budget of `config.guard`; see `RUN/stacks`", RESTARTED
    SAVE_FAILED = 43, "a checkpoint could not be saved; the last good one is there", "with space"
    CORRUPT = 44, "corrupt: no checkpoint verifies, or replicas hold different bits", "look first"
    MISMATCH = (
        45,
        "the processes differ in config or code, or a step consumed other data than before",
        "look first",
    )
    PEER_LOST = 46, "a process of the run never came or went away", RESTARTED
    SELF_CHECK = 47, "the start-up check found a kernel that computes something else", "no"
    DEVICE_ERROR = 48, "a device failed: an error of JAX's runtime", RESTARTED
    OUT_OF_MEMORY = 49, "out of memory, of a device or of the machine", "with a smaller config"
    LOCK_LOST = (
        50,
        "cut off from the bucket of its folder for so long that another process took over",
        "no: the other one goes on",
    )
    NO_PROGRESS = (
        51,
        "attempts in a row failed at one step, or without a new checkpoint; see `RUN/evidence`",
        "look first",
    )
    NO_STORAGE = 52, "a bucket does not answer, also after repeated requests", RESTARTED
    INTERRUPTED = (
        130,
        "Ctrl-C: saved in all processes at the same step (a second one ends at once, unsaved)",
        "yes",
    )
    TERMINATED = (
        143,
        "SIGTERM, such as a preemption or a time limit: saved likewise (one that follows within 3 "
        "seconds, as `timeout` sends it, is no second one)",
        RESTARTED,
    )


# What a shell shows of a process that crashed, or that something killed.
KILLS = tuple(
    128 + number for number in (signal.SIGABRT, signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV)
)
KILLED = "a process crashed, or was killed"


def restarts(code: int) -> bool:
    """True if a launcher starts the same command again after this code: it goes on from the last
    checkpoint, and may do better.
    """
    return code in KILLS or (code in list(Exit) and Exit(code).again == RESTARTED)


# Seconds to wait at most before the second attempt in a row without progress, the third, ...; half
# of it or more, at random, so that jobs that failed together don't all come back at once.
PAUSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 300)
# Seconds after which launchers, which don't see checkpoints, take an attempt for progress: twice
# the default of config.checkpoint.every_seconds.
PROGRESS = 1200


def longest_pause(failures: int) -> int:
    """The entry of PAUSES after so many attempts in a row without progress; 0 after none."""
    return PAUSES[min(failures, len(PAUSES)) - 1] if failures else 0


class RunError(Exception):
    """Ends a run with a message for the user and an exit code of its own."""

    code = Exit.ERROR
