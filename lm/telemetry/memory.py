"""Memory that a process and its device use."""

from __future__ import annotations

import os
from typing import Any

DEVICE = {"device_bytes": "bytes_in_use", "device_peak_bytes": "peak_bytes_in_use"}


def host_bytes() -> int | None:
    """Resident memory of this process; None where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return None


def usage(device: Any) -> dict[str, float]:
    """`host_bytes`, and those of a jax.Device: now, and the most so far; CPUs have none."""
    stats = device.memory_stats() or {}
    found = {"host_bytes": host_bytes()} | {n: stats.get(key) for n, key in DEVICE.items()}
    return {name: float(value) for name, value in found.items() if value is not None}
