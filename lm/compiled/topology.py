"""Devices that need not be here, by name: v5p:4x4x4, 2xv5e:16x16, h100:64, cpu:8.

    KIND:SHAPE      a TPU slice by its torus of chips: v4, v5e, v5p, v6e, tpu7x
    NxKIND:SHAPE    N slices, joined by the data centre's network
    KIND:COUNT      GPUs in nodes of 8, or KIND:NODESxGPUS: h100, h200, b200
    cpu:COUNT       fake devices of this machine

TPUs are described by libtpu, GPUs by jax's CUDA plugin; neither needs the hardware.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from lm.compiled import gpus
from lm.compiled.chips import CHIPS, Chip
from lm.types import Device

GPUS_PER_NODE = 8
# Shapes of slices that Cloud TPU offers (of one chip: machine types ct5lp-hightpu-1t,
# ct5p-hightpu-1t, ct6e-standard-1t and tpu7x-standard-1t), and numbers of GPUs: powers of two.
_SLICES = {
    3: "1x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24",
    2: "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    1: " ".join(str(2**i) for i in range(13)),
}
SLICES = {dims: shapes.split() for dims, shapes in _SLICES.items()}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips and their interconnect."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # of one slice's torus; (nodes, GPUs of a node); (count,)
    slices: int = 1

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    def closes(self, dimension: int) -> bool:
        """True if a dimension of a slice's torus is a ring.

        v4, v5p, tpu7x: optical switches join whole cubes of 4 x 4 x 4, and a slice smaller than one
        is connected in three dimensions without links that wrap around
        (https://cloud.google.com/tpu/docs/v5p). v5e, v6e: a pod is a torus of 16 x 16, and a slice
        wraps around along each dimension of 16 chips, as 8x16 along its longer one
        (https://jax-ml.github.io/scaling-book/tpus).
        """
        if self.chip.dims == 3:
            return all(n % 4 == 0 for n in self.shape)
        return self.chip.dims == 2 and self.shape[dimension] % 16 == 0


def parse(name: str) -> Topology:
    """The topology of a name.

    Raises:
        ValueError: the name has none of the forms above.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", name)
    if not found or found[2] not in CHIPS:
        raise ValueError(
            f"--topology={name} is unknown: KIND:SHAPE with KIND of {', '.join(CHIPS)}, as "
            "v5p:4x4x4, 2xv5e:16x16 (slices), h100:64 (in nodes of 8), h100:8x4 (nodes x GPUs), "
            "cpu:8"
        )
    slices, chip = int(found[1] or 1), CHIPS[found[2]]
    shape = tuple(int(n) for n in found[3].split("x"))
    if chip.platform == "tpu":
        if len(shape) != chip.dims:
            raise ValueError(
                f"--topology={name}: a {found[2]} slice has {chip.dims} dimensions, as "
                f"{found[2]}:{'x'.join(['4'] * chip.dims)}; given {len(shape)}"
            )
    elif slices > 1:
        raise ValueError(f"--topology={name}: only TPUs come in slices")
    elif chip.platform == "gpu" and len(shape) == 1:
        nodes, rest = divmod(shape[0], GPUS_PER_NODE)
        if rest and nodes:
            raise ValueError(
                f"--topology={name}: {shape[0]} GPUs must be divisible by the {GPUS_PER_NODE} of "
                f"a node; name other nodes as {found[2]}:NODESxGPUS"
            )
        shape = (nodes, GPUS_PER_NODE) if nodes else (1, shape[0])
    if min(shape) < 1 or slices < 1:
        raise ValueError(f"--topology={name}: sizes must be positive")
    return Topology(name, chip, shape, slices)


def devices(topology: Topology) -> Sequence[Device]:
    """The devices of a topology, for meshes and for compiling, not for running.

    Call it before anything else asks jax for devices: fake CPU devices and the quiet settings of
    libtpu count only then.

    Raises:
        ValueError: the compiler is not installed, or knows no such topology.
    """
    flag, platform = f"--topology={topology.name}", topology.chip.platform
    with contextlib.suppress(RuntimeError):  # jax has started: its platform and devices stay
        jax.config.update("jax_platforms", "cpu")  # leave a chip of this machine to others
        if platform == "cpu":
            jax.config.update("jax_num_cpu_devices", topology.num_chips)
    if platform == "cpu":
        count, found = topology.num_chips, jax.devices("cpu")
        if len(found) < count:
            raise ValueError(
                f"{flag} needs {count} fake devices and jax has started with {len(found)}: set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            )
        return found[:count]
    module, compiler, package = {
        "tpu": ("libtpu", "TPU", "libtpu"),
        "gpu": ("jax_cuda13_plugin", "GPU", "'jax[cuda13]'"),
    }[platform]
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"{flag} needs the {compiler} compiler: pip install {package} (no {compiler} needed)"
        )
    options = _describe_tpus(topology) if platform == "tpu" else _describe_gpus(topology)
    try:
        found = topologies.get_topology_desc(**options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error)
        if platform == "tpu" and _shape(topology) not in SLICES[topology.chip.dims]:
            reason = f"no slice has this shape; nearby are {', '.join(_nearby(topology))}"
        raise ValueError(f"{flag}: {reason}") from None
    assert len(found) == topology.num_devices, (topology, len(found))
    return found


def _shape(topology: Topology) -> str:
    return "x".join(map(str, topology.shape))


def _describe_tpus(topology: Topology) -> dict[str, Any]:
    """The arguments of jax's description of a topology."""
    # what libtpu would ask the machine for, and complain about, where there is no TPU
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-128",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {
        "platform": "tpu",
        "topology_name": f"{topology.chip.name}:{_shape(topology)}",
    }
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.num_chips == topology.slices:  # else libtpu wants whole hosts of 2 x 2
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip.config:
        options["chip_config_name"] = topology.chip.config
    return options


def _describe_gpus(topology: Topology) -> dict[str, Any]:
    # autotuning would run kernels on a GPU
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    return {
        "platform": "cuda",
        "topology_name": "",
        "target_config": gpus.target_config(topology.chip),
        "topology": f"1x{_shape(topology)}",
    }


def _nearby(topology: Topology) -> list[str]:
    """The three slices on offer that are closest in their number of chips, the smallest first."""
    count, chip = math.prod(topology.shape), topology.chip
    sizes = {s: math.prod(map(int, s.split("x"))) for s in SLICES[chip.dims]}
    offered = [shape for shape, size in sizes.items() if size >= chip.smallest]
    closest = sorted(offered, key=lambda s: abs(math.log(sizes[s] / count)))[:3]
    prefix = f"{topology.slices}x" if topology.slices > 1 else ""
    return [f"{prefix}{chip.name}:{s}" for s in sorted(closest, key=lambda s: sizes[s])]
