"""Published figures of chips: memory, bandwidth, links. FLOP/s are in lm/models/flops.py.

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
    tile: tuple[int, int] = (1, 1)  # the last two dimensions of an array are padded to it
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


def _tpu(
    name: str, kind: str, gib: float, hbm: float, link: float, network: float | None, dims: int
) -> Chip:
    return Chip(
        name,
        "tpu",
        kind,
        int(gib * GIB),
        hbm,
        link,
        network,
        source=f"https://cloud.google.com/tpu/docs/{name}; usable HBM: what libtpu 0.0.42 says is "
        "available",
        dims=dims,
        wraps=4 if dims == 3 else 16,
        tile=(8, 128),
    )


def _gpu(name: str, gib: float, hbm: float, link: float, source: str) -> Chip:
    kind, memory = f"NVIDIA {name.upper()}", int(gib * GIB)
    return Chip(name, "gpu", kind, memory, hbm, link, 50e9, source, tile=(1, 8))


# NVLink: half of the total that the data sheets print; one 400 Gbit/s port for each GPU, as in DGX
# systems. Memory: the total that CUDA reports, which is less than the data sheets' 80, 141 and
# 180 GB sound like (those are no decimal units of it either).
_SHEETS = "NVIDIA {0} data sheet (SXM), DGX {0} data sheet; memory as PyTorch prints it"
_B200 = (
    "NVIDIA DGX B200 data sheet: 64 TB/s and 14.4 TB/s of NVLink for 8; memory: "
    "https://github.com/pytorch/ao/pull/4002"
)

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # 32 GiB of HBM, 6 links of 50 GB/s (arXiv:2304.01433). Two cores are one device there,
        # as on Cloud TPUs ("megacore").
        dataclasses.replace(
            _tpu("v4", "TPU v4", 30.75, 1200e9, 50e9, None, dims=3), smallest=4, config="megacore"
        ),
        # 400 GB/s of ICI in both directions over 4 ports; 6.4 Tbit/s of network for 256 chips
        _tpu("v5e", "TPU v5 lite", 15.75, 819e9, 50e9, 3.125e9, dims=2),
        # 1200 GB/s of ICI in both directions over 6 ports; 50 Gbit/s of network a chip
        _tpu("v5p", "TPU v5", 95.74, 2765e9, 100e9, 6.25e9, dims=3),
        # 800 GB/s of ICI in both directions over 4 ports; 100 Gbit/s of network a chip
        _tpu("v6e", "TPU v6 lite", 31.25, 1638e9, 100e9, 12.5e9, dims=2),
        # Per chip: 7380 GB/s, 1200 GB/s of ICI over 6 ports, 100 Gbit/s; a chip is two devices.
        dataclasses.replace(
            _tpu("tpu7x", "TPU7x", 94.75, 7380e9 / 2, 100e9, 12.5e9, dims=3), devices=2
        ),
        _gpu("h100", 79.1, 3350e9, 450e9, _SHEETS.format("H100")),
        _gpu("h200", 139.8, 4800e9, 450e9, _SHEETS.format("H200")),
        _gpu("b200", 178.35, 8000e9, 900e9, _B200),
        # No accelerator and no published peaks: plans for it have no times.
        Chip("cpu", "cpu", "cpu", 0, 0.0, 0.0, None, "this machine"),
    )
}
