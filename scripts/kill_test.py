"""Kill a run many times, and compare its final bits with those of an undisturbed one.

    python scripts/kill_test.py --kills=20
    python scripts/kill_test.py --kills=50 --processes=2 --devices-per-process=2 --seed=1
    python scripts/kill_test.py --kills=20 --workdir=gs://BUCKET/kills
    python scripts/kill_test.py --kills=6 --processes=2 --restart-on=1,2,4 -- \\
        --config=configs/tiny.py --config.train.num_steps=400

Trains once without interruption. Then again, with SIGKILL at random moments: in start-up, inside a
step, inside an asynchronous save, inside an evaluation; of one process of several, or of all. In
between, the preparation of the data is killed too. At the end every parameter, every leaf of the
optimizer and every batch that was consumed are compared. On one and the same mesh all must be equal
to the bit; with --restart-on, which changes the number of processes (the batch stays), the batches
must be, and the largest difference of the weights is printed.

Arguments after -- go to scripts/train.py in place of --config=configs/smoke.py; both evaluate every
15 steps. Exit code 0 if nothing differs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lm import cli
from lm.checkpoint import manifest, step_files
from lm.checkpoint.arrays import StoredArrays
from lm.exit_codes import restarts
from lm.reliability import data_ledger
from lm.storage import files, growing
from lm.storage.epaths import StoragePath
from lm.telemetry import goodput

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("whole", "killed")
INTENTS = ("save", "evaluate", "step", "start")
EVAL_EVERY = 15
MOST_RESTARTS = 10  # after ends that were no kill
SMOKE = (
    f"--config={ROOT / 'configs' / 'smoke.py'}",
    "--config.checkpoint.every=10",
    "--config.log.parameter_table=False",
)


def main() -> int:
    argv = sys.argv[1:]
    own, of_train = argv, []
    if "--" in argv:
        at = argv.index("--")
        own, of_train = argv[:at], argv[at + 1 :]
    flags = _parser().parse_args(own)
    rng = random.Random(flags.seed)
    folder = Path(flags.out or tempfile.mkdtemp(prefix="kill_test."))
    folder.mkdir(parents=True, exist_ok=True)
    train = list(of_train or (*SMOKE, f"--config.train.num_steps={max(200, 30 * flags.kills)}"))
    train.append(f"--config.train.eval_every={EVAL_EVERY}")
    train += ["--config.guard.step_attempts=0", "--config.guard.max_attempts=0"]  # kills on purpose
    runs = flags.workdir or str(folder)
    test = KillTest(folder, runs, train, flags.devices_per_process)
    if not of_train:
        test.train.append(f"--config.data.train=('{prepare(folder, rng)}',)")

    print(f"in {folder}: the run that nobody touches", flush=True)
    test.finish("whole", flags.processes)
    counts = [int(n) for n in flags.restart_on.split(",")] if flags.restart_on else []
    intents = [INTENTS[i % len(INTENTS)] for i in range(flags.kills)]
    rng.shuffle(intents)
    killed = []
    for i, intent in enumerate(intents):
        processes = rng.choice(counts) if counts and i else flags.processes
        kill = test.kill(intent, processes, rng)
        if kill is None:
            break
        killed.append(kill)
        print(f"kill {i + 1}/{flags.kills} · {intent:8} · {kill['text']}", flush=True)
    test.finish("killed", flags.processes)
    return test.compare(killed, flags.kills, same_mesh=not counts)


def _parser() -> argparse.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10, help="default: 10")
    parser.add_argument("--processes", type=int, default=1, help="default: 1")
    parser.add_argument("--devices-per-process", type=int, default=4, help="default: 4")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    parser.add_argument(
        "--restart-on",
        default="",
        metavar="N,M,...",
        help="numbers of processes to go on with, one of them at random after every kill",
    )
    parser.add_argument(
        "--out", type=cli.local_path, help="folder for logs and data; default: a new one in $TMPDIR"
    )
    parser.add_argument(
        "--workdir", help="folder for the two runs, also gs:// or s3://; default: --out"
    )
    return parser


def prepare(folder: Path, rng: random.Random) -> Path:
    """A token store of a part of the standard library, its preparation killed three times, that is
    byte for byte that of an undisturbed preparation.
    """
    script = str(ROOT / "scripts" / "prepare_data.py")
    source = Path(json.__file__).parent.parent

    def command(out: Path) -> list[str]:
        data = [f"--data={source / part}/*.py" for part in ("json", "email", "asyncio", "xml/dom")]
        return [sys.executable, script, *data, "--tokenizer=bytes", f"--out={out}", "--workers=2"]

    began = time.monotonic()
    subprocess.run(command(folder / "data"), check=True, capture_output=True)
    took = time.monotonic() - began
    again = folder / "data_killed"
    for _ in range(3):
        process = subprocess.Popen(
            command(again),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(rng.uniform(0, took))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(again), check=True, capture_output=True)
    for path in sorted((folder / "data").rglob("*")):
        other = again / path.relative_to(folder / "data")
        if path.is_file() and path.read_bytes() != other.read_bytes():
            raise ValueError(f"{other} differs from {path} after its preparation was killed")
    print("data: killed 3 times while it was prepared, byte for byte the same", flush=True)
    return again / "train"


class KillTest:
    """Two runs, `whole` and `killed`, below `runs`; their logs in `folder`."""

    def __init__(self, folder: Path, runs: str, train: list[str], devices: int) -> None:
        self.folder, self.train, self._devices = folder, train, devices
        self._start_seconds = 5.0  # from the command to the first step, measured
        self._restarts = 0  # of jobs that ended with a code after which launchers restart them
        self.workdirs = {name: f"{runs}/{name}" for name in RUNS}
        self.workdir = self.workdirs["killed"]
        self._checkpoints = StoragePath(self.workdir) / "checkpoints"
        for workdir in self.workdirs.values():
            files.delete(workdir)

    def begin(self, name: str, processes: int) -> Job:
        launcher = str(ROOT / "scripts" / "launch" / "local.py")
        command = [sys.executable, launcher, f"--processes={processes}", "--grace=5"]
        command += [f"--devices-per-process={self._devices}", "--"]
        command += [
            str(ROOT / "scripts" / "train.py"),
            *self.train,
            f"--workdir={self.workdirs[name]}",
        ]
        return Job(command, self.folder / f"{name}.log")

    def finish(self, name: str, processes: int) -> None:
        """Train to the end."""
        while self._is_restarted(self.begin(name, processes)):
            pass

    def _is_restarted(self, job: Job) -> bool:
        """Wait for a job that nobody killed; True if a launcher starts it again, as after a
        connection that failed. Raises ValueError if it failed otherwise.
        """
        code = job.wait(check=False)
        if restarts(code) and self._restarts < MOST_RESTARTS:
            self._restarts += 1
            print(f"ended with exit code {code} (no kill), and is started again", flush=True)
            return True
        job.wait()
        return False

    def last_step(self) -> int:
        """The number of the last step in the ledger of the killed run, -1 before the first.

        In a bucket it is some seconds old.
        """
        lines = growing.read(f"{self.workdir}/{data_ledger.LEDGER_FILE}").split(b"\n")[:-1]
        return int(lines[-1].split(b'"step": ')[-1].split(b",")[0]) if lines else -1

    def kill(self, intent: str, processes: int, rng: random.Random) -> dict[str, Any] | None:
        """Start the killed run, kill it as intended, and say where it was; None if it ended."""
        before, saved = self.last_step(), self._saved()
        began = time.monotonic()
        job = self.begin("killed", processes)
        job.wait_for(lambda: bool(job.pids()))
        if intent == "start":
            until = time.monotonic() + rng.uniform(0, self._start_seconds)
            job.wait_for(lambda: time.monotonic() >= until or self._goes_on(job))
        else:
            job.wait_for(lambda: self._goes_on(job))
            self._start_seconds = 0.5 * self._start_seconds + 0.5 * (time.monotonic() - began)
            first = self.last_step()
            if intent == "step":
                target = first + rng.randint(1, 12)
                job.wait_for(lambda: self.last_step() >= target)
                job.sleep(rng.uniform(0, 0.02))
            elif intent == "save":
                job.wait_for(lambda: bool(self._saving()))
                job.sleep(rng.uniform(0, 0.05))
            else:
                at = ((first + 1) // EVAL_EVERY + 1) * EVAL_EVERY - 1
                job.wait_for(lambda: self.last_step() >= at)
                job.sleep(rng.uniform(0, 0.1))
        victims = job.pids()
        if not victims:
            return self.kill(intent, processes, rng) if self._is_restarted(job) else None
        chosen = victims if len(victims) == 1 or rng.random() < 0.5 else [rng.choice(victims)]
        saving = bool(self._saving())
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code = job.wait(check=False)
        saving &= bool(self._saving())  # its folder is still there: it never ended
        reached = self.last_step()
        new = reached > before
        where = f"after step {reached}" if new else f"before it got beyond step {before}"
        text = f"{where}, {'inside a save, ' if saving else ''}exit code {code}"
        if processes > 1:
            text += f", {len(chosen)} of {processes} processes"
        return {
            "intent": intent,
            "saving": saving,
            "text": text,
            "processes": processes,
            "reached": reached,
            "saved_before": saved,
        }

    def _goes_on(self, job: Job) -> bool:
        """True once this start is over and steps begin."""
        return "ready in" in job.output()

    def _saved(self) -> int:
        return max(step_files.steps(self._checkpoints), default=0)

    def _saving(self) -> list[StoragePath]:
        """The folders of saves that are under way."""
        return [p for p in self._checkpoints_found() if not step_files.is_complete(p)]

    def _checkpoints_found(self) -> list[StoragePath]:
        return list(self._checkpoints.iterdir()) if self._checkpoints.exists() else []

    def compare(self, killed: list[dict[str, Any]], wanted: int, *, same_mesh: bool) -> int:
        """Print what differs; 0 if nothing does that must not."""
        whole, other = (self._last_manifest(name) for name in RUNS)
        differ = [p for p in whole.leaves if whole.leaves[p] != other.leaves.get(p)]
        chains = whole.ledger == other.ledger
        whole_ledger, killed_ledger = map(data_ledger.read, self.workdirs.values())
        lines = whole_ledger == killed_ledger
        bad = files.list_names(f"{self.workdir}/bad_checkpoints")
        counts = collections.Counter(kill["intent"] for kill in killed)
        result = {
            "kills": len(killed),
            "intents": dict(counts),
            "other_restarts": self._restarts,
            "inside_a_save": sum(kill["saving"] for kill in killed),
            "steps": whole.step,
            "leaves": len(whole.leaves),
            "leaves_that_differ": len(differ),
            "same_ledger": chains and lines,
            "bad_checkpoints": len(bad),
            "goodput": str(self._goodput()),
        }
        if not same_mesh:
            result["largest_relative_difference"] = self._largest_difference(whole.step)
        print(json.dumps(result, indent=2))
        failed = not result["same_ledger"] or (same_mesh and differ) or result["bad_checkpoints"]
        if len(killed) < wanted:
            print(f"the run ended after {len(killed)} of {wanted} kills: give it more steps")
        print("FAILED" if failed else "ok: nothing differs" + ("" if same_mesh else " in the data"))
        return 1 if failed else 0

    def _last_manifest(self, name: str) -> manifest.Manifest:
        folder = StoragePath(self.workdirs[name]) / "checkpoints"
        return step_files.read_manifest(folder / str(step_files.steps(folder)[-1]))

    def _goodput(self) -> Any:
        return goodput.read(self.workdir)

    def _largest_difference(self, step: int) -> float:
        """The largest difference of two parameters, in parts of the largest of their array."""
        largest = 0.0
        folders = [StoragePath(w) / "checkpoints" / str(step) for w in self.workdirs.values()]
        manifests = [step_files.read_manifest(folder) for folder in folders]
        stored = [StoredArrays(f, m.leaves) for f, m in zip(folders, manifests, strict=True)]
        for name in manifests[0].leaves:
            if name.startswith("params."):
                a, b = (arrays.read(name) for arrays in stored)
                largest = max(largest, float(np.abs(a - b).max() / np.abs(a).max()))
        return largest


class Job:
    """One start of the launcher, with its output in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        self._start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file)

    def output(self) -> str:
        with self._log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def pids(self) -> list[int]:
        """The training processes that are alive."""
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        try:
            return [int(pid) for pid in path.read_text().split()]
        except OSError:
            return []

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds, or the job has ended."""
        while self._process.poll() is None and not condition():
            time.sleep(0.002)

    def sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self.wait_for(lambda: time.monotonic() >= until)

    def wait(self, *, check: bool = True) -> int:
        code = self._process.wait()
        if check and code:
            raise ValueError(f"exit code {code}, see {self._log}:\n{self.output()[-3000:]}")
        return code


if __name__ == "__main__":
    cli.run(main)
