"""Devices and processes: meshes, sharding rules, pipelines, and the process group of a run."""
