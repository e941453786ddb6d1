"""What the exit code of a run means, and the base of the errors that carry one.

Codes above 128 are 128 plus a signal's number, as a shell shows them; those of the project lie
where neither shells nor sysexits.h have theirs.
"""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    SUCCESS = 0
    ERROR = 1  # a mistake in the config or the files; the message says which
    USAGE = 2  # a mistake on the command line
    OUT_OF_DATA = 40  # the sources have no more epochs to read
    DIVERGED = 41  # a loss or gradient that is not finite, or a spike, and the policy says stop
    HUNG = 42  # a phase went over its budget; the stacks are in WORKDIR/stacks
    SAVE_FAILED = 43  # a checkpoint could not be written; the last good one is still there
    CORRUPT = 44  # no checkpoint verifies, or replicas hold different values
    MISMATCH = 45  # the processes of a run have different configs, code or data
    PEER_LOST = 46  # a process of the run never came, or went away
    SELF_CHECK = 47  # the start-up check found a kernel that computes something else
    INTERRUPTED = 130  # SIGINT: saved, the same command goes on
    TERMINATED = 143  # SIGTERM: saved, the same command goes on


class RunError(Exception):
    """Ends a run with a message for the user and an exit code of its own."""

    code = Exit.ERROR
