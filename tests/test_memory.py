"""Memory of a process and a device, in figures ."""

from types import SimpleNamespace

import numpy as np

from lm.telemetry import memory


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
