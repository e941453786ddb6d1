"""Attempts of a run: each start of its processes and its end, in RUN/attempts.jsonl.

    {"attempt": 4, "began": "2026-12-02T00:30:12+00:00", "host": "node7", "processes": 2,
     "from_step": 100, "ledger": 108, "step": 112, "ended": "2026-12-02T00:34:50+00:00", "code": 48,
     "error": "a device failed: INTERNAL: ..."}

`step` is the first one whose results are not known. The attempt ended in it or in the next one,
which starts before they are read: steps that differ by one count as the same. An attempt
without `ended` left no word: it crashed, was killed, or lost its machine. Its step is then found in
the ledger, or, of those that an earlier attempt had done (`ledger`), in lines of this file; in a
bucket either is up to 5 seconds old.

An attempt *fails* if it left no word, or ended with a code after which launchers start again,
except SIGTERM's, with which it has saved. It fails *at a step* if it had begun to train: what dies
before its first step, as in a preemption while it compiles, is the failure of no step. A run stops
with `Exit.NO_PROGRESS` in place of the next attempt
    - when the last `guard.step_attempts` attempts failed at one and the same step. Kills from
      outside, which hit any step, don't do that, unless the same one is hit each time;
    - when the last `guard.max_attempts` attempts failed and began at one and the same step: no
      checkpoint was added.
Any other end, that stop among them, starts both counts again.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import random
import socket
import time
from collections.abc import Callable, Iterable
from types import TracebackType

import jax

from lm.config.schema import GuardConfig
from lm.exit_codes import Exit, RunError, longest_pause, restarts
from lm.parallel import device_errors, process_group
from lm.reliability import data_ledger
from lm.storage import growing
from lm.storage.files import write_atomically
from lm.telemetry import jsonl
from lm.telemetry.jsonl import Record

ATTEMPTS_FILE = "attempts.jsonl"
NO_WORD = "it left no word: it crashed, was killed, or lost its machine"


class NoProgress(RunError):
    """Attempts in a row failed at one step, or without a new checkpoint."""

    code = Exit.NO_PROGRESS


def read(workdir: str) -> list[Record]:
    """The attempts of a run up to now, one record each."""
    return merge(jsonl.read(f"{workdir}/{ATTEMPTS_FILE}"))


def merge(lines: Iterable[Record]) -> list[Record]:
    """One record for each attempt that lines of attempts.jsonl are about."""
    merged: dict[int, Record] = {}
    for line in lines:
        merged.setdefault(line["attempt"], {}).update(line)
    return list(merged.values())


def failed(attempt: Record) -> bool:
    """True if an attempt that is over left no word, or asks to be started again without a save."""
    code = attempt.get("code")
    return code is None or (restarts(code) and code != Exit.TERMINATED)


def failures(attempts: list[Record], key: str, values: range) -> list[Record]:
    """The last attempts, in a row, that failed with one of the values of `key`."""
    found: list[Record] = []
    for attempt in reversed(attempts):
        if not failed(attempt) or attempt.get(key) not in values:
            break
        found.insert(0, attempt)
    return found


class Attempts:
    """A context of one attempt, from before it restores its state. All processes make one; the
    `active` one writes.
    """

    def __init__(self, workdir: str, config: GuardConfig, from_step: int, *, active: bool) -> None:
        """from_step: the step that the attempt begins at."""
        self._workdir, self._config, self._active = workdir, config, active
        done = _steps_in_ledger(workdir) if active else 0
        self._before = _with_last_words(read(workdir), done) if active else []
        self._from_step = self._step = from_step
        self._is_training = self._ended = False
        self._own: Record = {
            "attempt": 1 + max((a["attempt"] for a in self._before), default=0),
            "began": _now(),
            "host": socket.gethostname(),
            "processes": jax.process_count(),
            "from_step": from_step,
            "ledger": done,
        }
        self._file: jsonl.Writer | None = None
        self.stop_code = Exit.SUCCESS  # of an end without an error

    def check(
        self, describe_batches: Callable[[int], object], *, interrupted: Callable[[], bool]
    ) -> None:
        """Wait for longer, the more attempts before this one have failed; not on once it is
        `interrupted`.

        describe_batches: the records of the batches of a step and the next one, for the evidence.

        Raises:
            NoProgress: the attempts before this one failed as the module says; they are listed in
                WORKDIR/evidence.
        """
        fault, pause = process_group.from_lead("attempts", lambda: self._verdict(describe_batches))
        if fault:
            raise NoProgress(fault)
        if pause:
            process_group.print_on_lead(f"after attempts that failed: waiting for {pause:.0f} s")
        until = time.monotonic() + pause
        while time.monotonic() < until and not interrupted():
            time.sleep(0.1)

    def _verdict(self, describe_batches: Callable[[int], object]) -> tuple[str, float]:
        """(why the run stops, seconds to wait)."""
        c, last = self._config, self._before[-1:]
        same_start = failures(
            self._before, "from_step", range(self._from_step, self._from_step + 1)
        )
        step = last[0].get("step", -1) if last else -1
        same_step = [] if step < 0 else failures(self._before, "step", range(step - 1, step + 2))
        if 0 < c.step_attempts <= len(same_step):
            step = min(attempt["step"] for attempt in same_step)
            told, what = same_step, f"step {step} or the next one ended"
            batches = describe_batches(step)
            hint = "look at their batches, and at the errors; config.guard.step_attempts"
        elif 0 < c.max_attempts <= len(same_start):
            told, batches = same_start, None
            what = f"no checkpoint after that of step {self._from_step} came of"
            hint = "look at the errors; config.guard.max_attempts"
        else:
            count = len(same_start) if c.max_attempts else 0
            over = last[0].get("ended") or last[0]["began"] if last else _now()
            passed = datetime.datetime.fromisoformat(_now()) - datetime.datetime.fromisoformat(over)
            pause = longest_pause(count) * random.uniform(0.5, 1.0) - passed.total_seconds()
            return "", max(0.0, pause)
        path = f"{self._workdir}/evidence/attempts-{self._own['attempt']}.json"
        evidence = {"step": step, "attempts": told, "batches": batches}
        write_atomically(path, jsonl.dumps(evidence, indent=1) + "\n")
        error = f"{what} the last {len(told)} attempts, last with: {told[-1]['error']}"
        self._own |= {"ended": _now(), "code": Exit.NO_PROGRESS, "error": error}
        jsonl.Writer(self._path, [*self._before, self._own]).close()
        return (
            f"{error}; evidence: {path}. {hint} is the number of attempts. The same command, "
            "started again, makes as many more",
            0.0,
        )

    @property
    def _path(self) -> str:
        return f"{self._workdir}/{ATTEMPTS_FILE}"

    def __enter__(self) -> Attempts:
        self._file = jsonl.Writer(self._path, [*self._before, self._own], active=self._active)
        self._file.flush()
        return self

    def begin_steps(self) -> None:
        """Note that the first step comes now."""
        self._is_training = True
        self._append({"step": self._step})

    def end_step(self, step: int) -> None:
        """Note that the results of step number `step` are known."""
        self._step = step + 1
        if step < self._own["ledger"]:  # else the ledger shows it
            self._append({"step": self._step})

    def end(self, code: int, error: str) -> None:
        """Note the end, once."""
        if self._ended or self._file is None:
            return
        self._ended = True
        step = {"step": self._step} if self._is_training else {}
        lines = [line.strip() for line in error.splitlines() if line.strip()]
        text = " … ".join(line[:250] for line in dict.fromkeys(lines[:1] + lines[-1:]))
        self._append({**step, "ended": _now(), "code": int(code), "error": text})
        with contextlib.suppress(OSError):  # the error that ends the run is the one to tell
            self._file.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.end(self.stop_code, "")
        else:
            text = str(error) or type(error).__name__
            self.end(device_errors.code_of(error), text)

    def _append(self, fields: Record) -> None:
        assert self._file is not None
        self._file.append({"attempt": self._own["attempt"], **fields})


def _with_last_words(attempts: list[Record], done: int) -> list[Record]:
    """The attempts, with an error, and its step, for a last one that left no word.

    done: steps in the ledger.
    """
    if attempts and "ended" not in attempts[-1]:
        last = attempts[-1]
        last["error"] = NO_WORD
        if last.get("step", -1) >= last["ledger"]:
            last["step"] = done
    return attempts


def _steps_in_ledger(workdir: str) -> int:
    lines = growing.read(f"{workdir}/{data_ledger.LEDGER_FILE}").split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] + 1 if lines else 0


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
