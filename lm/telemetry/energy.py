"""Energy of a run: measured by counters of GPUs and CPUs where they can be read, else estimated.

    gpu     NVML's total energy of the GPUs of the lead process, times the share of all devices
    cpu     RAPL's packages and their memory (Linux: /sys/class/powercap, often for root alone), of
            the whole host of the lead process, whoever uses it
    device  published power of a device, times the devices and the time: an estimate, in place of
            the counter that is missing

The rest of a machine, its losses and its cooling are in none of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lm.telemetry.jsonl import Record

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
JOULES_PER_KWH = 3.6e6
T = TypeVar("T")

# Watts of one jax device, by the start of its `device_kind`: thermal design power, or the largest
# that a board may draw. Google publishes none of v5e, v5p, v6e and TPU7x.
WATTS = {
    # Jouppi et al., "A domain-specific supercomputer for training deep neural networks", CACM 2020,
    # table 3: of a chip, which is two devices.
    "TPU v2": 280 / 2,
    "TPU v3": 450 / 2,
    "TPU v4": 192,  # https://cloud.google.com/tpu/docs/v4: measured, at most
    # NVIDIA's data sheets
    "NVIDIA A10": 150,
    "NVIDIA A100-PCIE-40GB": 250,
    "NVIDIA A100 80GB PCIe": 300,
    "NVIDIA A100-SXM4": 400,
    "NVIDIA A30": 165,
    "NVIDIA L4": 72,
    "NVIDIA L40": 300,
    "NVIDIA L40S": 350,
    "NVIDIA H100": 700,  # SXM: "NVIDIA H100 80GB HBM3"
    "NVIDIA H100 NVL": 400,
    "NVIDIA H100 PCIe": 350,
    "NVIDIA H200": 700,
    "NVIDIA H200 NVL": 600,
    "NVIDIA B200": 1000,
    "NVIDIA GB200": 1200,
    "NVIDIA GeForce RTX 3090": 350,
    "NVIDIA GeForce RTX 4090": 450,
    "NVIDIA RTX A6000": 300,
}
# CodeCarbon's, for CPUs that it doesn't know: DEFAULT_POWER_PER_CORE of codecarbon/core/cpu.py
WATTS_PER_CPU = 4.0


def of_kind(table: Mapping[str, T], device_kind: str) -> T | None:
    """The figure of a kind of device, or None where it isn't known. Of several names that fit
    ("NVIDIA H100", "NVIDIA H100 PCIe") the longest counts. A MIG slice is a part of a chip, and
    unknown.
    """
    if " MIG " in device_kind:
        return None
    fits = [k for k in table if device_kind == k or device_kind.startswith((k + " ", k + "-"))]
    return table[max(fits, key=len)] if fits else None


def watts(device_kind: str) -> float | None:
    """Published watts of a jax device."""
    return of_kind(WATTS, device_kind)


class RaplCounter:
    """Joules of this host's CPU packages and their memory since this object was made.

    It must be called at least once while a counter runs through its range (at 200 W, in 20
    minutes).
    """

    def __init__(self, zones: Iterable[Path]) -> None:
        self._zones = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in zones}
        self._last = {zone: _microjoules(zone) for zone in self._zones}
        self._joules = 0.0

    def __call__(self) -> float:
        for zone, span in self._zones.items():
            now = _microjoules(zone)
            self._joules += (now - self._last[zone]) % span / 1e6  # it starts again from zero
            self._last[zone] = now
        return self._joules


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())


def rapl_counter(root: Path) -> RaplCounter | None:
    """The counter of this host, or None where it has none that this user may read."""
    try:
        named = {zone: (zone / "name").read_text().strip() for zone in root.glob("intel-rapl:*")}
        zones = [z for z, name in named.items() if name.startswith("package") or name == "dram"]
        return RaplCounter(sorted(zones)) if zones else None
    except OSError:
        return None


class NvmlCounter:
    """Joules of some GPUs since this object was made.

    gpus: indices in the order of PCI buses, or UUIDs.

    Raises:
        OSError: there is no NVML, or it has no such GPU, or no counter of one.
    """

    def __init__(self, gpus: Sequence[int | str], library: str) -> None:
        self._nvml = ctypes.CDLL(library)
        self._call("nvmlInit_v2")
        self._handles = [self._handle(gpu) for gpu in gpus]
        self._first = self._millijoules()

    def __call__(self) -> float:
        return (self._millijoules() - self._first) / 1e3

    def _call(self, name: str, *args: Any) -> None:
        if code := getattr(self._nvml, name)(*args):
            raise OSError(f"{name}: NVML error {code}")

    def _handle(self, gpu: int | str) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        if isinstance(gpu, int):
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(gpu), ctypes.byref(found))
        else:
            self._call("nvmlDeviceGetHandleByUUID", gpu.encode(), ctypes.byref(found))
        return found

    def _millijoules(self) -> int:
        total, energy = 0, ctypes.c_ulonglong()
        for handle in self._handles:
            self._call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(energy))
            total += energy.value
        return total


def nvml_counter(devices: Sequence[Any], library: str) -> NvmlCounter | None:
    """The counter of this process's GPUs, jax devices; None where NVML can't say.

    CUDA's order of unlike GPUs may be another than NVML's: CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()]
    try:
        own = [device.local_hardware_id for device in devices]
        chosen = [names[i] for i in own] if names else [str(i) for i in own]
        return NvmlCounter([int(x) if x.isdigit() else x for x in chosen], library)
    except (OSError, AttributeError, IndexError):
        return None


class EnergyMeter:
    """Energy of a run's devices since this object was made, in its lead process. A counter that
    fails keeps its last reading.

    devices: all of the run. local: those of this process. watts: of a device, in place of the
    published ones. gco2e_per_kwh: of the grid.
    """

    def __init__(
        self,
        devices: Sequence[Any],
        local: Sequence[Any],
        *,
        watts_per_device: float | None = None,
        gco2e_per_kwh: float | None = None,
    ) -> None:
        self._grid, first = gco2e_per_kwh, devices[0]
        gpu = nvml_counter(local, NVML) if first.platform in ("gpu", "cuda") else None
        cpu = rapl_counter(POWERCAP)
        found = {"gpu": (gpu, len(devices) / max(1, len(local))), "cpu": (cpu, 1.0)}
        self._counters = {name: (c, share) for name, (c, share) in found.items() if c is not None}
        self._joules = dict.fromkeys(self._counters, 0.0)
        one = watts(first.device_kind) if watts_per_device is None else watts_per_device
        self._watts = None if one is None else one * len(devices)  # of all, without a counter
        if first.platform == "cpu" and watts_per_device is None:
            self._watts = WATTS_PER_CPU * _usable_cpus()
        if gpu is not None or (first.platform == "cpu" and cpu is not None):
            self._watts = None

    def record(self, seconds: float) -> Record:
        """{"joules": {part: so far}, "gco2e_per_kwh"} of a process that began `seconds` ago."""
        for name, (counter, share) in self._counters.items():
            with contextlib.suppress(OSError, ValueError):
                self._joules[name] = round(counter() * share, 1)
        if self._watts is not None:
            self._joules["device"] = round(self._watts * seconds, 1)
        return {"joules": dict(self._joules), "gco2e_per_kwh": self._grid}


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Energy:
    """Energy that was measured and estimated, and its emissions; None: no intensity was given."""

    measured_kwh: float
    estimated_kwh: float
    kg_co2e: float | None

    @property
    def kwh(self) -> float:
        return self.measured_kwh + self.estimated_kwh

    @property
    def basis(self) -> str:
        """measured, estimated or both."""
        if not self.estimated_kwh:
            return "measured"
        return "both" if self.measured_kwh else "estimated"

    def figures(self) -> dict[str, float]:
        """Figures of a log, whose names say how they are known; {} where nothing is."""
        if not self.kwh:
            return {}
        kind = "measured" if self.basis == "measured" else "estimated"
        found = {f"kwh_{kind}": self.kwh}
        return found if self.kg_co2e is None else {**found, "kg_co2e": self.kg_co2e}

    def __str__(self) -> str:
        if not self.kwh:
            return "unknown: no counter, and no published power (config.log.watts_per_device)"
        how = self.basis
        if how == "both":
            how = f"{self.measured_kwh:.4g} measured and {self.estimated_kwh:.4g} estimated"
        emitted = "" if self.kg_co2e is None else f", {self.kg_co2e:.3g} kg CO2e"
        return f"{self.kwh:.4g} kWh ({how}){emitted}"


def total(records: Iterable[Record]) -> Energy:
    """The energy of records of an `EnergyMeter`, one of each process."""
    measured = estimated = 0.0
    kg: float | None = 0.0
    for record in records:
        joules, grid = record["joules"], record["gco2e_per_kwh"]
        own = joules.get("device", 0.0)
        measured, estimated = measured + sum(joules.values()) - own, estimated + own
        kwh = sum(joules.values()) / JOULES_PER_KWH
        kg = None if kg is None or grid is None else kg + kwh * grid / 1e3
    return Energy(measured / JOULES_PER_KWH, estimated / JOULES_PER_KWH, kg)
