"""Absent GPUs, described for XLA's compiler."""

from __future__ import annotations

from lm.compiled.chips import Chip

# From NVIDIA's data sheets and the tables of the CUDA programming guide: compute capability,
# multiprocessors, boost clock in GHz, L2 cache.
_GPUS = {
    "h100": ((9, 0), 132, 1.98, 50 * 2**20),
    "h200": ((9, 0), 132, 1.98, 50 * 2**20),
    "b200": ((10, 0), 148, 1.965, 126 * 2**20),
}


def target_config(chip: Chip) -> str:
    """XLA's GpuTargetConfig of a GPU, as a text proto.

    Limits that all of these share are those of their compute capability: 64k registers and 228 KiB
    of shared memory for each multiprocessor, of which a block may take 227 KiB.
    """
    (major, minor), cores, clock, cache = _GPUS[chip.name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: {48 * 1024}  shared_memory_per_core: {228 * 1024}
  shared_memory_per_block_optin: {227 * 1024}
  core_count: {cores}  fpus_per_core: 128  clock_rate_ghz: {clock}
  block_dim_limit_x: {2**31 - 1}  block_dim_limit_y: {2**16 - 1}  block_dim_limit_z: {2**16 - 1}
  memory_bandwidth: {int(chip.hbm_bandwidth)}
  l2_cache_size: {cache}
  device_memory_size: {chip.memory}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
device_description_str: "{chip.kind}"
"""
