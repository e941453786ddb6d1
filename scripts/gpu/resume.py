"""A run that is killed and resumed on a GPU, for scripts/gpu_check.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lm.checkpoint import step_files
from lm.storage.epaths import StoragePath
from scripts.gpu.rows import Check, Goal

ROOT = Path(__file__).resolve().parents[2]
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def resume(check: Check) -> None:
    """Bits of a run that is killed and resumed beside those of one that nobody touches, with
    deterministic kernels (they must be equal) and without (they may be).

    This process leaves the devices to the runs.
    """
    small = check.small
    for name, options in {"deterministic": DETERMINISTIC, "default": ""}.items():
        if small and options:
            continue  # no such flag on CPUs, which repeat bits
        with tempfile.TemporaryDirectory() as folder:
            leaves, killed_at = {}, 0
            for run in ("whole", "killed"):
                workdir = StoragePath(f"{folder}/{run}")
                words = _train_command(workdir, small)
                variables = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {options}".strip()}
                if run == "killed":
                    killed_at = _start_and_kill(words, variables, workdir)
                _call(words, variables)
                last = step_files.steps(workdir / "checkpoints")[-1]
                manifest = step_files.read_manifest(workdir / "checkpoints" / str(last))
                leaves[run] = manifest.leaves
        differ = [p for p in leaves["whole"] if leaves["whole"][p] != leaves["killed"].get(p)]
        figures = {"leaves": len(leaves["whole"]), "leaves_that_differ": len(differ)}
        figures["killed_after_step"] = killed_at
        goals = [Goal("killed_after_step", low=1)]
        if options or small:
            goals.append(Goal("leaves_that_differ", high=0))
        check.rows.add(name, figures, goals, details={"differ": differ[:20]})


def _train_command(workdir: StoragePath, small: bool) -> list[str]:
    """A run of scripts/train.py that saves often: GPT-2 of two layers, or a tiny model."""
    config = "smoke.py" if small else "gpt2.py:124m"
    settings = ["checkpoint.every=20", "loader.kind=thread", "log.trackers=('jsonl',)"]
    settings += ["guard.max_attempts=0", "guard.step_attempts=0", "data.validation=()"]
    if not small:
        settings += ["model.num_layers=2", "model.vocab_size=8192", "data.tokenizer=bytes"]
        settings += ["data.train=('synthetic:markov:4096',)", "data.batch_size=32"]
        settings += ["train.num_microbatches=1", "train.log_every=1"]
        settings += ["optimizer.schedule.warmup_steps=20"]
    settings += ["train.num_steps=100"]
    script = str(ROOT / "scripts/train.py")
    words = [sys.executable, script, f"--config={ROOT}/configs/{config}", f"--workdir={workdir}"]
    return words + [f"--config.{setting}" for setting in settings]


def _start_and_kill(words: list[str], variables: dict[str, str], workdir: StoragePath) -> int:
    """Kill a run as soon as it has a checkpoint; returns the step, 0 where the run was faster."""
    process = subprocess.Popen(words, env=os.environ | variables, stdout=subprocess.DEVNULL)
    folder = workdir / "checkpoints"
    while process.poll() is None:
        if folder.exists() and (steps := step_files.steps(folder)):
            process.send_signal(signal.SIGKILL)
            return 0 if process.wait() == 0 else steps[-1]
        time.sleep(0.002)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(words)}")
    return 0


def _call(words: list[str], variables: dict[str, str]) -> None:
    subprocess.run(words, env=os.environ | variables, stdout=subprocess.DEVNULL, check=True)
