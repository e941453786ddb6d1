"""Runs with their folder in an (emulated) bucket: killed and resumed, they end as a local one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import object_stores
import pytest
import storage_proxy
from environment import run_script

from lm import cli
from lm.checkpoint import comparison, step_files, verification
from lm.checkpoint.manager import Checkpoints, SaveFailed
from lm.config.schema import CheckpointConfig
from lm.data import packing
from lm.data.bins import Packing
from lm.data.tokens import TokenStore
from lm.exit_codes import Exit, restarts
from lm.preparation.corpus import Corpus
from lm.preparation.prepare import prepare
from lm.preparation.tokenizer_training import train_tokenizer
from lm.reliability import attempts, data_ledger
from lm.reliability.workdir_lock import LockLost, WorkdirLocked
from lm.storage import files, filesystems, growing, lease
from lm.storage.epaths import StoragePath
from lm.telemetry import metrics
from lm.training.loop import train
from lm.training.session import NoStorage, TrainingSession, disk_errors_as_run_errors

ROOT = Path(__file__).parents[1]
STEPS = 60


def start(workdir):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"--workdir={workdir}"]
    command += [f"--config={ROOT / 'configs' / 'smoke.py'}", f"--config.train.num_steps={STEPS}"]
    command += ["--config.checkpoint.every=10", "--config.log.parameter_table=False"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_run_in_a_bucket_goes_on_there_and_is_a_local_one(
    buckets, make_config, shared_steps, devices, tmp_path, scheme
):
    workdirs = str(tmp_path / "run"), f"{scheme}://{object_stores.BUCKET}/runs/whole"
    for workdir in workdirs:
        for num_steps in (3, 6):
            config = make_config({"train.num_steps": num_steps, "guard.self_check": False})
            config.log.trackers = ("jsonl", "tensorboard")
            config.optimizer.schedule.kind = "constant"
            assert train(config, workdir, devices[:1]) == 0
    local, there = (
        (
            step_files.read_manifest(StoragePath(w) / "checkpoints" / "6").leaves,
            data_ledger.read(w),
            [(r["step"], r["loss"]) for r in metrics.read(w)],
        )
        for w in workdirs
    )
    assert there == local
    assert files.list_names(f"{workdirs[1]}/lock") == ["00000002"]
    assert len(files.list_names(f"{workdirs[1]}/tensorboard")) == 2
    assert not [name for name in files.list_names(workdirs[1]) if name.endswith(".more")]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("runs") / "local")
    finish(start(workdir))
    return workdir


def leaves(workdir):
    return step_files.read_manifest(StoragePath(workdir) / "checkpoints" / str(STEPS)).leaves


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
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


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_stores_and_tokenizers_in_a_bucket_are_those_of_a_disk(buckets, tmp_path, scheme):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"document {i % 35}\n" * (50 + i))
    corpus, options = Corpus([f"{tmp_path}/*.txt"], validation_fraction=0.2), {"num_workers": 1}
    options["packings"] = [Packing(("text",), (64,))]
    rows = []
    for out in (str(tmp_path / "out"), f"{scheme}://{object_stores.BUCKET}/data"):
        tokenizer = f"{out}/tokenizer.model"
        sizes = {"vocab_size": 300, "sample_bytes": 10**6}
        choices = {"model_type": "bpe", "piece_span": "line", "split_digits": False}
        train_tokenizer(corpus, out=tokenizer, **sizes, **choices)
        prepared = prepare(corpus, tokenizer=tokenizer, out=out, **options)
        assert not [n for n in files.list_names(out) if n.startswith(("parts-", ".writable"))]
        store = TokenStore.open(f"{out}/train")
        store.verify()
        packed = packing.best_fit(store, 64)
        found = [source.read(np.arange(20)).ids for source in (packing.split(store, 50), packed)]
        content = [prepared.manifests[split]["content_hash"] for split in corpus.splits]
        rows.append([content, *(ids.tolist() for ids in found), packed.documents(np.arange(20))])
    assert rows[0] == rows[1]


@pytest.fixture
def requests(buckets):
    """(scheme, work) -> the number of requests that `work` made, and its result."""

    def count(scheme, work):
        before = object_stores.PROXIES[scheme].requests.total()
        result = work()
        return object_stores.PROXIES[scheme].requests.total() - before, result

    return count


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_checkpoint_costs_the_requests_that_the_docs_say(requests, make_experiment, scheme):
    experiment = make_experiment({"optimizer.name": "adamw"})
    state, workdir = experiment.init_state(), f"{scheme}://{object_stores.BUCKET}/runs/counted"
    with Checkpoints(workdir, CheckpointConfig(verify=False)) as checkpoints:

        def save():
            checkpoints.save(state)
            checkpoints.wait()

        assert requests(scheme, save)[0] <= 140
    folder = StoragePath(workdir) / "checkpoints" / "0"
    found, manifest = requests(scheme, lambda: step_files.read_manifest(folder))
    assert found <= 2
    assert requests(scheme, lambda: verification.verify(folder, manifest))[0] <= 12
    assert requests(scheme, lambda: step_files.steps(folder.parent))[0] == 2
    assert requests(scheme, lambda: files.total_size(folder))[0] <= 2
    with Checkpoints(workdir, CheckpointConfig(), read_only=True) as checkpoints:
        found, _ = requests(scheme, lambda: checkpoints.restore(experiment.abstract_state))
    assert found <= 16
    log = growing.GrowingFile(f"{workdir}/log.jsonl")
    log.append(b"{}\n")
    assert requests(scheme, log.flush)[0] == 1
    log.close()
    shown = run_script("checkpoint", "show", workdir)
    assert shown.returncode == 0 and "parameters; " in shown.stdout, shown.stderr
    found, distances = requests(scheme, lambda: comparison.distances([folder] * 2, manifest.leaves))
    assert found <= 24 and {d.largest for d in distances.values()} == {0}


@pytest.mark.slow
def test_a_step_costs_no_request(requests, make_config, shared_steps, devices, monkeypatch):
    monkeypatch.setattr(growing, "SECONDS", 3600)
    monkeypatch.setattr(lease, "SECONDS", 14400)
    found = []
    for num_steps in (4, 24):
        config = make_config({"train.num_steps": num_steps, "guard.self_check": False})
        config.optimizer.schedule.kind, config.checkpoint.verify = "constant", False
        workdir = f"gs://{object_stores.BUCKET}/runs/steps-{num_steps}"
        found.append(requests("gs", lambda c=config, w=workdir: train(c, w, devices[:1]))[0])
    assert abs(found[1] - found[0]) < 10  # of 20 steps; how often a save commits is a race


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize(
    "command",
    ["checkpoint ls X", "checkpoint show X@3", "checkpoint verify X", "evaluate --workdir=X"],
)
def test_a_missing_bucket_is_named_by_each_command(buckets, scheme, command):
    name, *arguments = command.replace("X", f"{scheme}://nobody-has-it/run").split()
    done = run_script(name, *arguments)
    assert done.returncode == Exit.ERROR
    assert f"there is no bucket {scheme}://nobody-has-it" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("key", ["init.from_", "data.train"])
def test_a_missing_bucket_that_a_config_names_is_named(
    buckets, make_config, devices, tmp_path, key
):
    url = "gs://nobody-has-it/run"
    config = make_config({key: (url,) if key == "data.train" else url})
    with pytest.raises(cli.USER_ERRORS, match="there is no bucket gs://nobody-has-it"):
        train(config, str(tmp_path), devices[:1])


def test_an_error_of_a_buckets_client_fails_a_save_and_is_no_damage(
    buckets, make_experiment, monkeypatch
):
    import gcsfs  # which reads its settings when it is imported

    workdir = f"gs://{object_stores.BUCKET}/runs/failing"
    state = make_experiment().init_state()
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        checkpoints.save(state)

    def fail(*_, **__):
        raise gcsfs.retry.HttpError({"code": 503, "message": "try later"})

    folder = StoragePath(workdir) / "checkpoints" / "0"
    with monkeypatch.context() as patch:
        patch.setattr(filesystems.filesystem("gs"), "cat_file", fail)
        with pytest.raises(step_files.Unreadable, match=f"{folder}.* try later"):
            step_files.read_manifest(folder)
        with pytest.raises(filesystems.StorageError, match="HttpError: try later, 503"):
            (folder / step_files.COMMITTED).read_text()
    with monkeypatch.context() as patch:
        patch.setattr(filesystems.filesystem("gs"), "pipe_file", fail)
        with (
            pytest.raises(SaveFailed, match=r"step 1 could not be saved.* try later") as failed,
            Checkpoints(workdir, CheckpointConfig()) as checkpoints,
        ):
            checkpoints.save(state.replace(step=state.step + 1))
            checkpoints.wait()
    assert failed.value.code == Exit.NO_STORAGE and len(str(failed.value).splitlines()) == 1
    assert step_files.steps(folder.parent) == [0]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_preparation_in_a_bucket_that_is_killed_ends_with_the_same_bytes(
    buckets, tmp_path, scheme
):
    rng = np.random.default_rng(0)
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(" ".join(map(str, rng.integers(0, 10**6, 3000))))
    hashes, out = [], f"{scheme}://{object_stores.BUCKET}/killed"
    corpus = Corpus([f"{tmp_path}/*.txt"], validation_fraction=0.2)
    local = prepare(corpus, tokenizer="bytes", out=tmp_path / "out", num_workers=1)
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--tokenizer=bytes"]
    command += [f"--data={tmp_path}/*.txt", "--validation-fraction=0.2", f"--out={out}"]
    for seen in ("part-000000.json", "part-000003.json", "bucket-0000.bin", ""):
        process = subprocess.Popen(
            [*command, "--workers=2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        work = [name for name in files.list_names(out) if name.startswith("parts-")]
        while (
            process.poll() is None
            and seen
            and seen not in (files.list_names(f"{out}/{work[0]}") if work else [])
        ):
            time.sleep(0.05)
            work = [name for name in files.list_names(out) if name.startswith("parts-")]
        if seen:
            process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    for split, manifest in local.manifests.items():
        store = TokenStore.open(f"{out}/{split}")
        store.verify()
        hashes.append((store.manifest["content_hash"], manifest["content_hash"]))
    assert all(there == here for there, here in hashes)
    assert files.list_names(out) == ["plan.json", "train", "validation"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_pretrain_in_a_bucket_ends_as_on_a_disk(buckets, tmp_path, scheme):
    text = "".join(f"a line of {i} or {i * i % 977} words and no more\n" for i in range(4000))
    (tmp_path / "a.txt").write_text(text)
    summaries = []
    for root in (str(tmp_path), f"{scheme}://{object_stores.BUCKET}/pretrain"):
        command = [sys.executable, str(ROOT / "scripts" / "pretrain.py")]
        command += [f"--data={tmp_path}/a.txt", f"--workdir={root}/run", f"--stores={root}/stores"]
        settings = {"model.vocab_size": 400, "model.num_layers": 1, "train.num_steps": 4}
        settings |= {"data.batch_size": 8, "optimizer.schedule.warmup_steps": 1}
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        for _ in range(2):  # the second finds all done
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
        summary = json.loads(files.read_bytes(f"{root}/run/summary.json"))
        of_time = {"train_seconds", "tokens_per_second", "energy"}
        assert of_time < summary.keys()
        summaries.append({k: v for k, v in summary.items() if k not in of_time})
        assert {"loss.png", "samples.txt", "report.html"} < set(files.list_names(f"{root}/run"))
        assert files.list_names(f"{root}/stores/train/shard-00000/text") == [
            "bytes.bin",
            "index.bin",
            "offsets.bin",
            "tokens.bin",
        ]
    assert summaries[0] == summaries[1]


def test_a_missing_bucket_ends_a_run_before_it_compiles(buckets, make_config, devices):
    with pytest.raises(FileNotFoundError, match="there is no bucket gs://nobody-has-it"):
        train(make_config({}), "gs://nobody-has-it/run", devices[:1])


def test_a_bucket_that_fails_ends_a_run_with_a_code_that_launchers_restart():
    with (
        pytest.raises(NoStorage, match=r"gs://b/a: 503; the same command resumes") as ended,
        disk_errors_as_run_errors("gs://b"),
    ):
        raise filesystems.StorageError("gs://b/a: 503")
    assert ended.value.code == Exit.NO_STORAGE and restarts(ended.value.code)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_folder_is_one_run_however_its_slashes_are_written(buckets, make_config, devices, scheme):
    workdir = f"{scheme}://{object_stores.BUCKET}/runs/slashes"
    config = make_config({"train.num_steps": 1, "guard.self_check": False})
    for spelling in (f"{workdir}/", workdir.replace("runs/", "runs//")):
        assert cli.folder(spelling) == workdir
        with (
            lease.lock(f"{workdir}/lock"),
            pytest.raises(WorkdirLocked, match=f"process {os.getpid()} on"),
        ):
            train(config, spelling, devices[:1])


def test_a_run_whose_lock_was_taken_ends_before_it_saves_again(
    buckets, make_config, shared_steps, devices, monkeypatch
):
    workdir = f"gs://{object_stores.BUCKET}/runs/taken"
    push = TrainingSession.push_results

    def taken(self, step, *rest):
        push(self, step, *rest)
        if step == 5:  # while this process was cut off
            assert files.create(f"{workdir}/lock/00000002", "{}")

    monkeypatch.setattr(TrainingSession, "push_results", taken)
    config = make_config({"checkpoint.every": 4, "train.num_steps": 12, "guard.self_check": False})
    with pytest.raises(LockLost, match=r"00000002.* trains there"):
        train(config, workdir, devices[:1])
    assert LockLost.code == attempts.read(workdir)[-1]["code"] == Exit.LOCK_LOST
    assert step_files.steps(StoragePath(workdir) / "checkpoints") == [4]
    assert files.read_bytes(f"{workdir}/lock/00000002") == b"{}"
    assert data_ledger.read(workdir)[-1]["step"] < 8


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_save_replaces_what_a_holder_that_lost_the_lock_left_of_it(
    buckets, make_experiment, scheme
):
    state, workdir = make_experiment().init_state(), f"{scheme}://{object_stores.BUCKET}/runs/left"
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        folder = StoragePath(workdir) / "checkpoints" / "0"
        # while this one trained: the other one ends the save that it was in
        files.write_atomically(f"{folder}/params/d/half", b"of the other one")
        assert checkpoints.save(state)
        checkpoints.wait()
        assert step_files.is_verified(folder) and not files.exists(f"{folder}/params/d/half")
        assert not checkpoints.save(state)  # it is there


SHORT_LEASE = """
import runpy, sys

sys.argv = sys.argv[1:]
from lm.storage import lease
lease.SECONDS = 4.0
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_when_it_finds_another_holder(buckets, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 4.0)
    workdir = f"gs://{object_stores.BUCKET}/runs/cut-off"
    with storage_proxy.Proxy(os.environ["STORAGE_EMULATOR_HOST"]) as proxy:
        urls = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), proxy.url)
        command = [sys.executable, "-c", SHORT_LEASE, str(ROOT / "scripts" / "train.py")]
        command += [f"--config={ROOT / 'configs' / 'smoke.py'}", f"--workdir={workdir}"]
        command += ["--config.train.num_steps=100000", "--config.checkpoint.every=0"]
        command += ["--config.checkpoint.every_seconds=0", "--config.guard.self_check=False"]
        # as a start with glibc's huge pages, which would lose the -c
        own = {**os.environ, **urls, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        process = subprocess.Popen(
            command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            deadline = time.monotonic() + 300
            while not data_ledger.read(workdir):  # it trains
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
            proxy.fail = 1.0  # no request of this process gets through
            with contextlib.ExitStack() as held:
                while time.monotonic() < deadline:
                    with contextlib.suppress(lease.Locked):
                        held.enter_context(lease.lock(f"{workdir}/lock"))
                        break
                    time.sleep(0.2)
                proxy.fail = 0.0
                output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == Exit.LOCK_LOST, output
    assert "error: " in output and "another process has taken its lock" in output
    assert not files.exists(f"{workdir}/checkpoints")
