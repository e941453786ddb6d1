"""The clients of Weights & Biases and MLflow: real processes, killed, resumed and hanging.

`pip install -e '.[trackers]'`; with the whole of mlflow there is a server, too.
"""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from lm.storage import files
from lm.telemetry import metrics
from lm.telemetry.trackers.tracker import by_step, values_by_name
from lm.telemetry.trackers.wandb_run import read_rows

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
CLOCK = (
    *("seconds", "tokens_per_second", "goodput", "mfu", "host_seconds", "host_cpu_seconds"),
    *("host_bytes", "device_bytes", "device_peak_bytes"),
    *("kwh_measured", "kwh_estimated", "kg_co2e"),
)
SETTINGS = (
    "train.num_steps=60",
    "train.eval_every=20",
    "checkpoint.every=20",
    "log.tracker_tags=('kill', 'test')",
    "log.tracker_notes=killed once",
    "guard.self_check=False",
)


def command(workdir, *settings):
    script = [sys.executable, str(ROOT / "scripts/train.py"), f"--config={ROOT}/configs/smoke.py"]
    return [*script, f"--workdir={workdir}", *(f"--config.{s}" for s in (*SETTINGS, *settings))]


def steps_done(workdir):
    return max((r["step"] for r in metrics.read(str(workdir))), default=0)


def kill_at(step, workdir, words, environment):
    """Run until `step` is in metrics.jsonl, then SIGKILL; return the last step there."""
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    while steps_done(workdir) < step:
        assert process.poll() is None, "it ended first"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return steps_done(workdir)


def run(words, environment, **options):
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def expected(workdir):
    """{name: {step: value}} of metrics.jsonl."""
    found = {}
    for step, records in by_step(metrics.read(str(workdir))).items():
        for name, value in values_by_name(records).items():
            found.setdefault(name, {})[step] = value
    return found


def assert_same(sent, workdir, redone=range(0)):
    """sent: {name: [(step, value)]}. Values of the clock of `redone` steps are the first ones."""
    wanted = expected(workdir)
    assert sent.keys() == wanted.keys()
    for name, pairs in sent.items():
        assert [step for step, _ in pairs] == list(wanted[name]), name  # none twice, none lost
        is_clock = name.rpartition("/")[2] in CLOCK
        for step, value in pairs:
            if not (is_clock and step in redone):
                assert value == wanted[name][step], (name, step)
    assert len(wanted["train/loss"]) == 60


def wandb_rows(workdir):
    """The rows of all files of the run, in the order of the processes that wrote them."""
    folder = pathlib.Path(workdir, "wandb")
    paths = sorted(folder.glob("offline-run-*/*.wandb"))
    return [list(read_rows(path.read_bytes())) for path in paths]


def wandb_run_records(path):
    """(config, tags, notes) of a file; None of one whose process was killed before its first."""
    from wandb.proto import wandb_internal_pb2

    from lm.telemetry.trackers.wandb_run import _read_log

    for data in _read_log(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            run = record.run
            config = {x.key: json.loads(x.value_json) for x in run.config.update}
            return config, list(run.tags), run.notes
    return None


def test_wandb_files_of_a_run_that_was_killed_are_its_metrics(tmp_path):
    pytest.importorskip("wandb")
    environment = {**os.environ, "WANDB_MODE": "offline"}
    words = command(tmp_path, "log.trackers=('jsonl','wandb')")
    killed_at = kill_at(31, tmp_path, words, environment)
    run(words, environment)
    run(words, environment)  # finished: it sends what a busy machine has not in time
    first, second, *more = wandb_rows(tmp_path)
    rows = [*first, *second, *itertools.chain(*more)]
    print(f"killed at {killed_at}: {len(first)} rows in the first file, {len(second)} after it")
    assert [row["_step"] for row in rows] == [row["step"] for row in rows]
    sent = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("train/", "eval/")):
                sent.setdefault(name, []).append((row["step"], value))
    assert_same(sent, tmp_path, redone=range(21, killed_at + 1))
    paths = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len({path.name for path in paths}) == 1  # one id
    saved = json.loads((tmp_path / "config.json").read_text())
    records = [wandb_run_records(path) for path in paths]
    assert all(records[1:])
    for config, tags, notes in filter(None, records):
        code = config.pop("code_version")
        config.pop("_wandb", None)
        assert config == saved and len(code["source"]) == 64
        assert sorted(tags) == ["kill", "test"] and notes == "killed once"


def send_media(workdir):
    """A table and a picture, sent by a process of its own."""
    code = f"""
import io
from PIL import Image
from lm.telemetry.trackers import opening
from lm.telemetry.trackers.tracker import RunInfo
png = io.BytesIO()
Image.new("RGB", (4, 2), "red").save(png, "png")
info = RunInfo({str(workdir)!r}, "lm", (), "", {{}}, {{}})
rows = [{{"prompt": "a", "text": " b"}}, {{"prompt": "c", "text": "é"}}]
media = {{"tables": {{"samples": rows}}, "pictures": {{"loss": png.getvalue()}}}}
opening.send_rest(("wandb", "mlflow"), info, print, step=60, **media)
"""
    return [sys.executable, "-c", code]


def test_tables_and_pictures_are_read_back(tmp_path):
    pytest.importorskip("wandb"), pytest.importorskip("mlflow.store.tracking.sqlalchemy_store")
    import mlflow
    from PIL import Image

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    client.search_experiments()
    environment = {**os.environ, "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": uri}
    run(send_media(tmp_path), environment, cwd=tmp_path)
    [rows] = wandb_rows(tmp_path)
    found = {name: value for row in rows for name, value in row.items()}
    [folder] = tmp_path.glob("wandb/offline-run-*/files")
    table = json.loads((folder / found["samples/path"]).read_text())
    assert table["columns"] == ["prompt", "text"] and table["data"] == [["a", " b"], ["c", "é"]]
    assert Image.open(folder / found["loss/path"]).size == (4, 2)
    [stored] = client.search_runs([client.get_experiment_by_name("lm").experiment_id])
    path = client.download_artifacts(stored.info.run_id, "samples_60.json", str(tmp_path))
    assert json.loads(pathlib.Path(path).read_text())["data"] == [["a", " b"], ["c", "é"]]
    path = client.download_artifacts(stored.info.run_id, "loss_60.png", str(tmp_path))
    assert Image.open(path).size == (4, 2)


@contextlib.contextmanager
def mlflow_server(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "server", f"--port={port}", "--host=127.0.0.1"]
    words += [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", "--workers=1"]
    words += [f"--artifacts-destination={folder}/artifacts"]
    process = subprocess.Popen(words, cwd=folder, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("kind", ["sqlite", "server"])
def test_an_mlflow_run_that_was_killed_has_its_metrics(tmp_path, kind, monkeypatch):
    pytest.importorskip("mlflow.server" if kind == "server" else "mlflow")
    workdir = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        if kind == "server":
            uri = stack.enter_context(mlflow_server(tmp_path))
        import mlflow

        client = mlflow.MlflowClient(uri)
        client.search_experiments()  # makes the tables: a kill meanwhile would leave half of them
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
        words = command(workdir, "log.trackers=('jsonl','mlflow')")
        killed_at = kill_at(31, workdir, words, environment)
        run(words, environment, cwd=tmp_path)
        run(words, environment, cwd=tmp_path)  # finished: it sends what is missing
        monkeypatch.chdir(tmp_path)
        experiment = client.get_experiment_by_name("lm").experiment_id
        [found] = client.search_runs([experiment])
        sent = {}
        for name in found.data.metrics:
            history = client.get_metric_history(found.info.run_id, name)
            sent[name] = sorted((m.step, m.value) for m in history)
        assert_same(sent, workdir, redone=range(21, killed_at + 1))
        saved = json.loads((workdir / "config.json").read_text())
        folder = client.download_artifacts(found.info.run_id, "config.json", str(tmp_path))
        assert json.loads(pathlib.Path(folder).read_text()) == saved
        assert found.data.params["model.num_layers"] == str(saved["model"]["num_layers"])
        assert found.data.tags["kill"] == "true" and len(found.data.tags["code.source"]) == 64
        assert found.data.tags["mlflow.note.content"] == "killed once"
        assert found.info.status == "FINISHED" and found.info.run_name == "run"


@contextlib.contextmanager
def server_that_hangs():
    """An address that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_server_that_hangs_does_not_hold_up_the_end_of_a_run(tmp_path, name):
    pytest.importorskip(name)
    with server_that_hangs() as uri:
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": uri,
            "WANDB_BASE_URL": uri,
            "WANDB_API_KEY": "0" * 40,
        }
        words = command(tmp_path, f"log.trackers=('jsonl','{name}')")
        began = time.monotonic()
        output = run(words, environment, timeout=600)
        took = time.monotonic() - began
    print(f"{name}: {took:.0f} s in all")
    assert output.count("config.log.trackers:") == 1 and steps_done(tmp_path) == 60
    assert "has not taken all records" in output or "fails and is tried again" in output


def test_files_of_a_run_in_a_folder_are_read_up_to_a_cut(tmp_path):
    pytest.importorskip("wandb")
    environment = {**os.environ, "WANDB_MODE": "offline"}
    run(command(tmp_path, "log.trackers=('jsonl','wandb')"), environment)
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = files.read_bytes(path)
    whole = list(read_rows(content))
    assert len(whole) == 60
    for size in range(0, len(content), 997):
        rows = list(read_rows(content[:size]))
        assert rows == whole[: len(rows)]
