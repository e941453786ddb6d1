"""Memory of a process and of its device, in figures and over a long run."""

from types import SimpleNamespace

import numpy as np
import pytest

from lm.telemetry import memory, metrics
from lm.training import loop


def test_resident_memory_grows_by_what_is_touched():
    before = memory.host_bytes()
    held = np.ones(25_000_000)  # 200 MB
    assert 190e6 < memory.host_bytes() - before < 300e6
    del held


def test_a_device_counts_where_it_counts_at_all():
    stats = {"bytes_in_use": 3, "peak_bytes_in_use": 7, "bytes_limit": 10}
    device = SimpleNamespace(memory_stats=lambda: stats)
    found = memory.usage(device)
    assert (found["device_bytes"], found["device_peak_bytes"]) == (3.0, 7.0)
    assert memory.usage(SimpleNamespace(memory_stats=lambda: None)).keys() == {"host_bytes"}


@pytest.mark.slow
def test_a_run_of_2000_steps_and_50_saves_leaks_nothing(make_config, devices, tmp_path):
    """Measured, in MB: 422 at step 100, 479 at 1,000, 501 at 1,500 and 502 at 2,000. The bound is
    30 kB for each of the last 500 steps, or 1.2 MB for each of their 12 saves.
    """
    changes = {
        "train.num_steps": 2000,
        "train.log_every": 20,
        "train.eval_every": 200,
        "data.validation": ("synthetic:markov:40:7",),
        "checkpoint.every": 40,
        "log.layers_every": 50,
    }
    assert loop.train(make_config(changes), str(tmp_path), devices[:1]) == 0
    records = [r for r in metrics.read(str(tmp_path)) if r["kind"] == "train"]
    used = {r["step"]: r["host_bytes"] for r in records}
    assert used[2000] - used[1500] < 15e6
