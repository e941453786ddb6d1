"""Start a script as several processes of one run on this machine, on fake CPU devices.

    python scripts/launch/local.py --processes=2 --devices-per-process=2 -- \
        scripts/train.py --config=configs/tiny.py --workdir=runs/tiny

Each process gets --coordinator, --num-processes and --process-id. Ctrl-C and SIGTERM go to all of
them; a second one kills them. When one fails, the others get --grace seconds to end by themselves.
The exit code is that of the first that failed, before those that only lost it. After some of them
(lm/exit_codes.py has the table) the job starts again, --max-restarts times in a row, with growing,
random pauses; an attempt of 20 minutes starts both anew. What a run itself counts, by its
checkpoints, is in lm/reliability/attempts.py.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from lm import cli
from lm.exit_codes import PROGRESS, Exit, longest_pause, restarts

# The processes end so together, when each is ready: none of them keeps the others waiting for long.
TOGETHER = (Exit.SUCCESS, Exit.INTERRUPTED, Exit.TERMINATED)
LAST_WORDS = 5.0  # seconds between the signals that end a process more and more surely
DEVICES = "--xla_force_host_platform_device_count"


@dataclasses.dataclass
class Child:
    """A process of the run."""

    number: int
    process: subprocess.Popen[bytes]
    readers: list[threading.Thread]
    ended: bool = False  # by this launcher

    @property
    def code(self) -> int | None:
        """The exit code as a shell shows it, or None while it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def send(self, number: signal.Signals) -> None:
        """Signals the process and what it started, all of which are in its process group."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)


class Stop:
    """The user's SIGINT or SIGTERM, forwarded to `children`; a second one kills them."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self.received = False
        self._event = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        for child in self.children:
            child.send(signal.SIGKILL if self.received else signal.Signals(number))
            child.send(signal.SIGCONT)  # a stopped process gets nothing else
        self.received = True
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Wait, at most until a signal comes; True if one has come."""
        return self._event.wait(seconds)


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    stop = Stop()
    restarted = 0  # in a row
    while True:
        began = time.monotonic()
        children = stop.children = _start(arguments)
        if stop.received:  # while they were started
            for child in children:
                child.send(signal.SIGTERM)
        try:
            code, why = _wait(children, arguments.grace)
        finally:
            for child in children:
                child.send(signal.SIGKILL)
        if code == 0:
            return 0
        print(f"launch: {why}", file=sys.stderr)
        if time.monotonic() - began > PROGRESS:
            restarted = 0
        if stop.received or not restarts(code) or restarted == arguments.max_restarts:
            return code
        restarted += 1
        pause = longest_pause(restarted) * random.uniform(0.5, 1.0)
        print(
            f"launch: starting again in {pause:.1f} s ({restarted} of {arguments.max_restarts})",
            file=sys.stderr,
        )
        if stop.wait(pause):
            return code


def decisive(codes: Sequence[int]) -> int:
    """The exit code of a job whose processes ended with these, in this order: the first failure
    that is not the loss of another process.
    """
    failures = [code for code in codes if code != Exit.SUCCESS]
    causes = [code for code in failures if code != Exit.PEER_LOST]
    return next(iter(causes or failures), int(Exit.SUCCESS))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices-per-process", type=int, default=1)
    parser.add_argument("--max-restarts", type=int, default=0, help="of the whole job, in a row")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds")
    parser.add_argument("--log-dir", type=Path, help="also write what process I says to I.log")
    parser.add_argument("command", nargs="+", metavar="SCRIPT", help="the script and its arguments")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1 or arguments.devices_per_process < 1 or arguments.max_restarts < 0:
        parser.error(
            "--processes and --devices-per-process are positive, --max-restarts is not < 0"
        )
    return arguments


def _start(arguments: argparse.Namespace) -> list[Child]:
    """All processes, on a port that is free."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    kept = re.sub(rf"{DEVICES}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{kept} {DEVICES}={arguments.devices_per_process}".strip(),
        "PYTHONUNBUFFERED": "1",
    }
    if arguments.log_dir:
        arguments.log_dir.mkdir(parents=True, exist_ok=True)
    children = []
    for number in range(arguments.processes):
        command = [sys.executable, *arguments.command]
        if arguments.processes > 1:
            command += [
                f"--coordinator=localhost:{port}",
                f"--num-processes={arguments.processes}",
                f"--process-id={number}",
            ]
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C in a terminal reaches the launcher alone
            preexec_fn=_die_with(os.getpid()),
        )
        log = (
            (arguments.log_dir / f"{number}.log").open("ab", buffering=0)
            if arguments.log_dir
            else None
        )
        prefix = f"[{number}] ".encode() if number else b""
        readers = [
            _forward(source, target.buffer, prefix, log)
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        children.append(Child(number, process, readers))
    return children


def _die_with(parent: int) -> Callable[[], None]:
    """Make the kernel kill this child when the launcher dies."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return prepare


def _forward(
    source: IO[bytes] | None, target: IO[bytes], prefix: bytes, log: Any
) -> threading.Thread:
    """A started thread that passes on the lines of a process."""
    assert source is not None

    def work() -> None:
        for line in source:
            if line.startswith(b"[Gloo] Rank"):  # it greets on standard output
                continue
            with contextlib.suppress(BrokenPipeError):
                target.write(prefix + line)
                target.flush()
            if log:
                log.write(line)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _wait(children: Sequence[Child], grace: float) -> tuple[int, str]:
    """Waits for the end of all; returns the exit code of the job and a sentence about it."""
    ended: list[tuple[Child, int]] = []
    deadline, signals = float("inf"), [signal.SIGTERM, signal.SIGKILL]
    while running := [child for child in children if child not in [c for c, _ in ended]]:
        for child in running:
            code = child.code
            if code is None:
                continue
            ended.append((child, code))
            if code not in TOGETHER and deadline == float("inf"):
                deadline = time.monotonic() + grace
                for other in running:  # a stopped one wakes, and its watchdog writes its stacks
                    other.send(signal.SIGCONT)
        if time.monotonic() > deadline and signals:
            number = signals.pop(0)
            for child in running:
                child.ended = True
                child.send(number)
            deadline = time.monotonic() + LAST_WORDS
        time.sleep(0.02)
    for child in children:
        for reader in child.readers:
            reader.join(timeout=1.0)
    own = [(child, code) for child, code in ended if not child.ended]
    code = decisive([code for _, code in own])
    number = next((child.number for child, its in own if its == code), 0)
    return code, f"process {number} {_described(code)}"


def _described(code: int) -> str:
    if code in list(Exit):
        return f"ended with exit code {code} ({Exit(code).name})"
    if code > 128:
        return f"was killed by {signal.Signals(code - 128).name}"
    return f"ended with exit code {code}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
