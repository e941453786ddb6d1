"""Runs with their folder in an (emulated) bucket: killed and resumed, they end as a local one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import object_stores
import pytest

from lm.checkpoint import step_files
from lm.reliability import data_ledger
from lm.storage import files
from lm.storage.epaths import StoragePath
from lm.telemetry import metrics

ROOT = Path(__file__).parents[1]
STEPS = 60


@pytest.fixture(scope="module")
def buckets():
    with object_stores.emulators() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        files.filesystem.cache_clear()
        yield
    files.filesystem.cache_clear()


def start(workdir):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"--workdir={workdir}"]
    command += [f"--config={ROOT / 'configs' / 'smoke.py'}", f"--config.train.num_steps={STEPS}"]
    command += ["--config.checkpoint.every=10", "--config.log.parameter_table=False"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("runs") / "local")
    finish(start(workdir))
    return workdir


def leaves(workdir):
    return step_files.read_manifest(StoragePath(workdir) / "checkpoints" / str(STEPS)).leaves


@pytest.mark.parametrize("scheme", ["gs", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_run_in_a_bucket_that_is_killed_ends_with_the_bits_of_a_local_one(buckets, local, scheme):
    workdir = f"{scheme}://{object_stores.BUCKET}/runs/killed"
    process, checkpoints = start(workdir), StoragePath(workdir) / "checkpoints"
    while not step_files.steps(checkpoints):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    output = finish(start(workdir))
    assert f"from step 0 to {STEPS}" not in output
    assert leaves(workdir) == leaves(local)
    assert data_ledger.read(workdir) == data_ledger.read(local)
    losses = [[r["loss"] for r in metrics.read(w)] for w in (workdir, local)]
    assert losses[0] == losses[1]
    assert files.list_names(f"{workdir}/lock") == ["00000002"]


def test_a_missing_bucket_ends_a_run_before_it_compiles(buckets):
    process = start("gs://nobody-has-it/run")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "there is no bucket gs://nobody-has-it" in output and "ready in" not in output
