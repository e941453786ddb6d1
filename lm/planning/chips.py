"""What the makers publish about chips: memory, bandwidth, links. FLOP/s are in lm/models/flops.py.

All figures are peaks, per jax device unless the name says otherwise; what a program reaches is
less.
"""

from __future__ import annotations

import dataclasses
import os

from lm.models import flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    TPU chips are wired to their neighbours in a torus of `dims` dimensions, two links each. GPUs
    of a node reach each other at `link` through a switch, others through the network.
    """

    name: str
    platform: str  # tpu, gpu or cpu
    kind: str  # what jax calls the device: a key of flops.PEAK_FLOPS
    memory: int  # bytes of a device: of a TPU what a program may use, of a GPU all of it
    hbm_bandwidth: float  # bytes/s of a device
    link: float  # bytes/s, one direction: of an ICI link of a chip; of a GPU to its switch
    network: float | None  # bytes/s of a chip to other slices or nodes; None: not published
    source: str
    dims: int = 1  # of the torus
    wraps: int = 0  # a torus dimension closes to a ring where it is a multiple of this; 0: never
    devices: int = 1  # jax devices of a chip
    smallest: int = 1  # chips of the smallest slice on offer
    tile: tuple[int, int] = (1, 1)  # what the last two dimensions of an array are padded to
    config: str = ""  # libtpu's chip_config_name, where its default is not what users get

    @property
    def hbm(self) -> int:
        """Bytes of a device that a program may use: of a GPU the share that jax takes."""
        return int(self.memory * gpu_share()) if self.platform == "gpu" else self.memory

    def peak_flops(self, dtype: str) -> float | None:
        """Dense FLOP/s of a device in bfloat16; float32 products have no published peak."""
        return flops.peak_flops(self.kind, dtype)

    def dtype_with_peak(self) -> str:
        """Hint where there is no peak: the flag of a type that has one, if any."""
        return "" if self.peak_flops("bfloat16") is None else PEAK_FLAG


PEAK_FLAG = "; --config.model.dtype=bfloat16 has a published peak"


def gpu_share() -> float:
    """The share of a GPU's memory that jax takes for all programs: three quarters, unless its own
    variables say another one.
    """
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if os.environ.get(name):
            return float(os.environ[name])
    return 0.75


_CLOUD = "https://cloud.google.com/tpu/docs"
_LIBTPU = "usable HBM: what libtpu 0.0.42 says is available"

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # 32 GiB of HBM, 6 links of 50 GB/s (arXiv:2304.01433). Two cores are one device there,
        # as on Cloud TPUs ("megacore").
        Chip(
            *("v4", "tpu", "TPU v4", int(30.75 * GIB), 1200e9, 50e9, None),
            f"{_CLOUD}/v4, arXiv:2304.01433; {_LIBTPU}",
            dims=3,
            wraps=4,
            smallest=4,
            tile=(8, 128),
            config="megacore",
        ),
        # 400 GB/s of ICI in both directions over 4 ports; 6.4 Tbit/s of network for 256 chips
        Chip(
            *("v5e", "tpu", "TPU v5 lite", int(15.75 * GIB), 819e9, 50e9, 3.125e9),
            f"{_CLOUD}/v5e; {_LIBTPU}",
            dims=2,
            wraps=16,
            tile=(8, 128),
        ),
        # 1200 GB/s of ICI in both directions over 6 ports; 50 Gbit/s of network a chip
        Chip(
            *("v5p", "tpu", "TPU v5", int(95.74 * GIB), 2765e9, 100e9, 6.25e9),
            f"{_CLOUD}/v5p; {_LIBTPU}",
            dims=3,
            wraps=4,
            tile=(8, 128),
        ),
        # 800 GB/s of ICI in both directions over 4 ports; 100 Gbit/s of network a chip
        Chip(
            *("v6e", "tpu", "TPU v6 lite", int(31.25 * GIB), 1638e9, 100e9, 12.5e9),
            f"{_CLOUD}/v6e; {_LIBTPU}",
            dims=2,
            wraps=16,
            tile=(8, 128),
        ),
        # Per chip: 7380 GB/s, 1200 GB/s of ICI over 6 ports, 100 Gbit/s; a chip is two devices.
        Chip(
            *("tpu7x", "tpu", "TPU7x", int(94.75 * GIB), 7380e9 / 2, 100e9, 12.5e9),
            f"{_CLOUD}/tpu7x; {_LIBTPU}",
            dims=3,
            wraps=4,
            devices=2,
            tile=(8, 128),
        ),
        # NVLink: half of the total that the data sheets print; one 400 Gbit/s port for each GPU,
        # as in DGX systems. Memory: the total that CUDA reports, which is less than the data
        # sheets' 80, 141 and 180 GB sound like (those are no decimal units of it either).
        Chip(
            *("h100", "gpu", "NVIDIA H100", int(79.1 * GIB), 3350e9, 450e9, 50e9),
            "NVIDIA H100 data sheet (SXM), DGX H100 data sheet; memory as PyTorch prints it",
            tile=(1, 8),
        ),
        Chip(
            *("h200", "gpu", "NVIDIA H200", int(139.8 * GIB), 4800e9, 450e9, 50e9),
            "NVIDIA H200 data sheet (SXM), DGX H200 data sheet; memory as PyTorch prints it",
            tile=(1, 8),
        ),
        Chip(
            *("b200", "gpu", "NVIDIA B200", int(178.35 * GIB), 8000e9, 900e9, 50e9),
            "NVIDIA DGX B200 data sheet: 64 TB/s and 14.4 TB/s of NVLink for 8; memory: "
            "https://github.com/pytorch/ao/pull/4002",
            tile=(1, 8),
        ),
        # No accelerator and no published peaks: plans for it have no times.
        Chip("cpu", "cpu", "cpu", 0, 0.0, 0.0, None, "this machine"),
    )
}
