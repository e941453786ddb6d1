"""Absent GPUs, described for XLA's compiler."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm.planning import chips

if TYPE_CHECKING:
    from lm.planning.topology import Topology

# From NVIDIA's data sheets and the tables of the CUDA programming guide (compute capability 9.0
# and 10.0): multiprocessors, boost clock in GHz, L2 cache.
_GPUS = {
    "h100": ((9, 0), 132, 1.98, 50 * 2**20),
    "h200": ((9, 0), 132, 1.98, 50 * 2**20),
    "b200": ((10, 0), 148, 1.965, 126 * 2**20),
}
_NAMES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "b200": "NVIDIA B200"}


def target_config(name: str) -> str:
    """XLA's GpuTargetConfig of a GPU, as a text proto.

    Limits that all of these share are those of their compute capability: 64k registers and 228 KiB
    of shared memory for each multiprocessor, of which a block may take 227 KiB.
    """
    capability, cores, clock, cache = _GPUS[name]
    chip = chips.CHIPS[name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_core: {228 * 1024}
  shared_memory_per_block_optin: {227 * 1024}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  memory_bandwidth: {int(chip.hbm_bandwidth)}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {chip.memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
device_description_str: "{_NAMES[name]}"
"""


def devices(topology: Topology) -> Sequence[Any]:
    """The GPUs of a topology of `shape` (nodes, GPUs of a node); see `topology.devices`."""
    import jax
    from jax.experimental import topologies

    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ValueError(
            f"--topology={topology.name} needs the GPU compiler: pip install 'jax[cuda13]' "
            "(no GPU needed)"
        )
    # Autotuning would run kernels on a GPU.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    nodes, per_node = topology.shape
    try:
        described = topologies.get_topology_desc(
            topology_name="",
            platform="cuda",
            target_config=target_config(topology.chip.name),
            topology=f"1x{nodes}x{per_node}",
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={topology.name}: {error}") from None
    return described.devices
