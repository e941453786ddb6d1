"""Files of older code stay readable: a store and a run of 2026-12-01, in golden/run.tar.gz.

They were made at commit 9916a9d on one CPU device: 24 small texts by scripts/prepare_data.py with
the byte tokenizer, and six steps of configs/smoke.py with one layer of width 8, saved at 4 and 6.
"""

import json
import shutil
import tarfile
from pathlib import Path

import jax
import pytest

from lm.config import conversion
from lm.data.tokens import TokenStore
from lm.exit_codes import Exit
from lm.telemetry import metrics
from lm.training.evaluation import evaluate
from lm.training.loop import train
from lm.training.restore import restore_params
from lm.training.stored_run import load

ARCHIVE = Path(__file__).parent / "golden" / "run.tar.gz"
SOURCE = "store/validation"


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """The folder of the run, beside its store."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def last_loss(workdir):
    evals = [r for r in metrics.read(str(workdir)) if r["kind"] == "eval"]
    assert evals[-1]["step"] == 6
    return evals[-1]["loss"]


def test_an_old_store_opens_with_its_documents(workdir):
    store = TokenStore.open(SOURCE)
    text = store.tokenizer().decode(store.tokens(0, int(store.offsets[1])))
    assert store.num_documents == 4 and text.startswith("Line 0 of text ")
    assert text.endswith(".\n") and "naïve café, 東京" in text


@pytest.mark.parametrize("num_devices", [1, 2])
def test_an_old_checkpoint_restores_and_evaluates_as_it_did(workdir, num_devices):
    experiment = load(str(workdir), jax.devices()[:num_devices])
    step, params = restore_params(experiment, str(workdir))
    assert step == 6
    results = evaluate(experiment, params)
    assert results[SOURCE]["loss"] == pytest.approx(last_loss(workdir), rel=1e-6)


def test_an_old_run_goes_on_with_the_same_data_to_the_same_loss(workdir):
    before = last_loss(workdir)
    consumed = (workdir / "ledger.jsonl").read_text().splitlines()
    shutil.rmtree(workdir / "checkpoints" / "6")
    config = conversion.from_json((workdir / "config.json").read_text())
    assert train(config, str(workdir), jax.devices()[:1]) == Exit.SUCCESS
    assert last_loss(workdir) == pytest.approx(before, rel=1e-6)
    again = (workdir / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in again] == [json.loads(line) for line in consumed]
