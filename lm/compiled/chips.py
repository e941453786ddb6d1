"""Published figures of chips: memory, bandwidth, links. FLOP/s are in lm/models/flops.py, watts in
lm/telemetry/energy.py.

All figures are peaks, per jax device unless the name says otherwise; what a program reaches is
less.
"""

from __future__ import annotations

import dataclasses
import os

from lm.compiled.costs import NARROW
from lm.models import flops
from lm.telemetry import energy

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    TPU chips are wired to their neighbours in a torus of `dims` dimensions, two links each. GPUs
    of a node reach each other at `link` through a switch, others through the network.
    """

    name: str
    platform: str  # tpu, gpu or cpu
    kind: str  # what jax calls the device: found in flops.PEAK_FLOPS
    memory_gib: float  # of a device: of a TPU what a program may use, of a GPU all of it
    hbm_bandwidth: float  # bytes/s of a device
    link: float  # bytes/s, one direction: of an ICI link of a chip; of a GPU to its switch
    network: float | None  # bytes/s of a chip to other slices or nodes; None: not published
    dims: int = 1  # of the torus
    devices: int = 1  # jax devices of a chip
    smallest: int = 1  # chips of the smallest slice on offer
    config: str = ""  # libtpu's chip_config_name, where its default is not what users get
    doubled: tuple[str, ...] = ()  # types (s8, f8) of products at twice the rate of bfloat16

    @property
    def memory(self) -> int:
        """Bytes of a device."""
        return int(self.memory_gib * GIB)

    @property
    def hbm(self) -> int:
        """Bytes of a device that a program may use: of a GPU the share that jax takes."""
        return int(self.memory * gpu_share()) if self.platform == "gpu" else self.memory

    @property
    def tile(self) -> tuple[int, int]:
        """The last two dimensions of an array are padded to a multiple of it."""
        return {"tpu": (8, 128), "gpu": (1, 8), "cpu": (1, 1)}[self.platform]

    def peak_flops(self, dtype: str) -> float | None:
        """Dense FLOP/s of a device in bfloat16; float32 products have no published peak."""
        return flops.peak_flops(self.kind, dtype)

    @property
    def watts(self) -> float | None:
        """Published power of a device; None where there is none."""
        return energy.watts(self.kind)

    def speedup(self, kind: str) -> float:
        """The rate of products of two operands of a type, as `costs.narrow_type` names it, over
        that of bfloat16.
        """
        return 2.0 if kind in self.doubled else 1.0

    def dtype_with_peak(self) -> str:
        """Hint where there is no peak: the flag of a type that has one, if any."""
        flag = "--config.model.dtype=bfloat16 has a published peak"
        return "" if self.peak_flops("bfloat16") is None else f"; {flag}"


def gpu_share() -> float:
    """The share of a GPU's memory that jax takes for all programs: three quarters, unless its own
    variables say another one.
    """
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    return float(next((os.environ[n] for n in names if os.environ.get(n)), 0.75))


# TPUs: https://cloud.google.com/tpu/docs/NAME. Memory is what libtpu leaves to a program of the
# 16, 32 and 96 GiB that there are (the page of v5p names the reserve): its refusals of a program
# that is too large say so ("exceeds available HBM (15.75G)"; libtpu 0.0.42, held by a test).
# Their pages have int8 at 394, 918 and 1836 TOPS for v5e, v5p and v6e, and fp8 at 4614 TFLOPS for
# TPU7x: twice bfloat16. v4 has 275 for both.
# GPUs: data sheets of NVIDIA's GPUs (SXM) and DGX systems. NVLink is half of the total that they
# print; one 400 Gbit/s port for each GPU. Memory is the total that CUDA reports, as PyTorch prints
# it, which is less than the data sheets' 80, 141 and 180 GB sound like (those are no decimal units
# of it either); B200: https://github.com/pytorch/ao/pull/4002. XLA's allocator takes its share of
# that total (xla/pjrt/gpu/gpu_helpers.cc: total_memory * memory_fraction), not of what is free.
# Dense fp8 and int8 are 1979 TFLOPS on H100 and H200 and 4500 on B200: twice bfloat16.
_CHIPS = (
    # 32 GiB of HBM, 6 links of 50 GB/s (arXiv:2304.01433). Two cores are one device there, as on
    # Cloud TPUs ("megacore").
    Chip("v4", "tpu", "TPU v4", 30.75, 1200e9, 50e9, None, dims=3, smallest=4, config="megacore"),
    # 400 GB/s of ICI in both directions over 4 ports; 6.4 Tbit/s of network for 256 chips
    Chip("v5e", "tpu", "TPU v5 lite", 15.75, 819e9, 50e9, 3.125e9, dims=2, doubled=("s8",)),
    # 1200 GB/s of ICI in both directions over 6 ports; 50 Gbit/s of network a chip
    Chip("v5p", "tpu", "TPU v5", 95.74, 2765e9, 100e9, 6.25e9, dims=3, doubled=("s8",)),
    # 800 GB/s of ICI in both directions over 4 ports; 100 Gbit/s of network a chip
    Chip("v6e", "tpu", "TPU v6 lite", 31.25, 1638e9, 100e9, 12.5e9, dims=2, doubled=("s8",)),
    # Per chip: 7380 GB/s, 1200 GB/s of ICI over 6 ports, 100 Gbit/s; a chip is two devices.
    Chip(
        "tpu7x",
        "tpu",
        "TPU7x",
        94.75,
        7380e9 / 2,
        100e9,
        12.5e9,
        dims=3,
        devices=2,
        doubled=("f8",),
    ),
    Chip("h100", "gpu", "NVIDIA H100 80GB HBM3", 79.1, 3350e9, 450e9, 50e9, doubled=NARROW),
    Chip("h200", "gpu", "NVIDIA H200", 139.8, 4800e9, 450e9, 50e9, doubled=NARROW),
    Chip("b200", "gpu", "NVIDIA B200", 178.35, 8000e9, 900e9, 50e9, doubled=NARROW),
    # No accelerator and no published peaks: plans for it have no times.
    Chip("cpu", "cpu", "cpu", 0, 0.0, 0.0, None),
)
CHIPS = {chip.name: chip for chip in _CHIPS}
