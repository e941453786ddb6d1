"""Cluster environment: the launcher of this process, its id, and the number of processes."""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

PORT = 8476  # of the coordinator, where each job has its machines for itself


@dataclasses.dataclass(frozen=True)
class Environment:
    """The launcher of this process, and its place among the processes of the run."""

    launcher: str
    coordinator: str = ""  # HOST:PORT of process 0
    num_processes: int = 1
    process_id: int = 0
    gpus: tuple[int, ...] | None = None  # of this process, among the visible ones; None: all

    def __str__(self) -> str:
        if self.num_processes == 1:
            return f"launcher: {self.launcher}; one process"
        return (
            f"launcher: {self.launcher}; {self.num_processes} processes, "
            f"coordinator {self.coordinator}"
        )


def detect(
    environ: Mapping[str, str], *, metadata: Callable[[str], str | None] = lambda key: None
) -> Environment:
    """The environment of the first that applies: SLURM, Kubernetes, Cloud TPU, none. Raises
    ValueError where the launcher's variables are incomplete.

    metadata: the attributes of a Cloud TPU VM by name, asked only if nothing else fits.
    """
    if "SLURM_STEP_NUM_TASKS" in environ:  # of the step: a shell inside an allocation is one task
        return _slurm(environ)
    if "TPU_WORKER_HOSTNAMES" in environ:  # set by GKE, and before Kubernetes, which shows too
        return _tpu(environ, environ["TPU_WORKER_HOSTNAMES"], environ.get("TPU_WORKER_ID", "0"))
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return _kubernetes(environ)
    worker = metadata("agent-worker-number")
    if worker is not None:
        # either HOST,HOST or NAME:ID:HOST,NAME:ID:HOST
        endpoints = (metadata("worker-network-endpoints") or "").split(",")
        hosts = ",".join(endpoint.split(":")[-1] for endpoint in endpoints)
        lines = re.findall(r"^(\w+):\s*'?([^'\n]*)", metadata("tpu-env") or "", re.MULTILINE)
        return _tpu({**dict(lines), **environ}, hosts, worker)
    return Environment("none")


def _slurm(environ: Mapping[str, str]) -> Environment:
    tasks = int(environ["SLURM_STEP_NUM_TASKS"])
    if tasks == 1:
        return Environment("SLURM")
    # jobs share machines: a port of its own for each, above the ephemeral range of most
    port = 61440 + int(environ["SLURM_JOB_ID"]) % 4096
    return Environment(
        "SLURM",
        f"{_first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        tasks,
        int(environ["SLURM_PROCID"]),
        _share_of_gpus(environ),
    )


def _first_host(nodes: str) -> str:
    """rack1node3 of rack[1-2]node[3-4],other; node001 of node[001-003,7]."""
    match = re.match(r"(?:[^,\[\]]|\[[^\]]+\])+", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no host")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", match[0])


def _share_of_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of this task, by index among the visible ones; None: all of them.

    All GPUs of a node are visible to a task unless SLURM binds them (--gpus-per-task, --gpu-bind)
    or something else has set CUDA_VISIBLE_DEVICES: then fewer than there are.
    """
    tasks = _tasks_on_node(environ)
    platforms = environ.get("JAX_PLATFORMS", "cuda")
    if tasks == 1 or not re.search("cuda|gpu", platforms):
        return None
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    count = int(environ.get("SLURM_GPUS_ON_NODE") or present)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if not count or (visible is not None and len(visible.split(",")) < count):
        return None
    if count % tasks:
        raise ValueError(
            f"SLURM: the {count} GPUs of this node don't divide among its {tasks} tasks; set "
            "--ntasks-per-node=1, or --gpus-per-task"
        )
    share = count // tasks
    first = int(environ["SLURM_LOCALID"]) * share
    return tuple(range(first, first + share))


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """The entry of this node in SLURM_STEP_TASKS_PER_NODE, such as 2(x3),1: two on each of three
    nodes, one on a fourth.
    """
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):
        counts += [int(number)] * int(times or 1)
    node = int(environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else 1


def _kubernetes(environ: Mapping[str, str]) -> Environment:
    wanted = ("JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_INDEX", "JOB_PODS", "NUM_PROCESSES")
    missing = [name for name in wanted if name not in environ]
    if missing:
        raise ValueError(
            f"this is a pod of an indexed Kubernetes Job, but {', '.join(missing)} "
            "are not set: set them as scripts/launch/gke.yaml does, or give --coordinator"
        )
    name, job = environ["JOBSET_NAME"], environ["REPLICATED_JOB_NAME"]
    index, pods = int(environ["JOB_INDEX"]), int(environ["JOB_PODS"])
    return Environment(
        "Kubernetes JobSet",
        f"{name}-{job}-0-0.{name}:{PORT}",
        int(environ["NUM_PROCESSES"]),
        index * pods + int(environ["JOB_COMPLETION_INDEX"]),
    )


def _tpu(environ: Mapping[str, str], hosts: str, worker: str) -> Environment:
    workers = hosts.split(",")
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    if len(workers) * slices == 1:
        return Environment("Cloud TPU")
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    number = int(environ.get("MEGASCALE_SLICE_ID") or 0) * len(workers) + int(worker)
    return Environment("Cloud TPU", f"{first.split(':')[0]}:{PORT}", len(workers) * slices, number)


def gce_metadata(key: str) -> str | None:
    """An attribute of this Cloud TPU VM; None if it has no such attribute, or is no such VM."""
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if not chips or "TPU_SKIP_MDS_QUERY" in os.environ:
        return None
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5.0) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return None
