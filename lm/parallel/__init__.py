"""Devices and processes: meshes, sharding rules, pipelines, and the processes of one run."""
