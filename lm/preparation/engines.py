"""Engines that run the tasks of a stage on many machines: SLURM by datatrove's executor, and Ray.

    --engine='slurm partition=cpu time=24:00:00 mem_per_cpu_gb=4 workers=1000'
    --engine='ray cpus_per_task=1 memory_gb=4'
    --engine='local workers=8'      datatrove's executor on this machine

The words after the name are parameters of datatrove's executor, or of `_ray` below. A task is a
function of its number that writes its output atomically, so it may run anywhere, again, or twice.

Ray runs the tasks itself: datatrove 0.10's executor for it waits for ever where a node dies while
one of its actors is being placed (seen with two nodes of which one was killed).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm.config.suggestions import suggestion
from lm.preparation import call_flags

ENGINES = {"local": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": ""}
_HIDDEN = ("pipeline", "tasks", "logging_dir", "skip_completed", "depends", "sbatch_args")
_ATTEMPTS = 10  # of a task whose node dies


class Tasks:
    """A step of a pipeline whose rank r runs the task `numbers[r]`."""

    def __init__(self, run: Callable[[int], object], numbers: Sequence[int]):
        self.run, self.numbers = run, tuple(numbers)

    def __call__(self, data: None, rank: int, world_size: int) -> None:
        assert world_size == len(self.numbers), "one rank for each task"
        self.run(self.numbers[rank])


def parse(engine: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the parameters of an engine.

    Raises:
        ValueError: there is no such engine or parameter, or one is missing.
        ModuleNotFoundError: a package that it needs is not installed.
    """
    flag = f"--engine={engine!r}"
    name, words = call_flags.split(engine, flag)
    if name not in ENGINES:
        known = f"{', '.join(ENGINES)}{suggestion(name, ENGINES)}"
        raise ValueError(f"{flag} is no engine; there are: {known}")
    package = "ray" if name == "ray" else "datatrove"
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{flag} needs {package}: pip install {package}", name=package)
    function, hidden = (_ray, ("task", "numbers")) if name == "ray" else (_executor(name), _HIDDEN)
    return name, call_flags.arguments(call_flags.signature(function, hidden), words, flag)


def _executor(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module("datatrove.executor"), ENGINES[name])


class Engine:
    """An engine in the place of `Workers`.

    folder: of the work, for logs; for SLURM on storage that all machines share.
    """

    def __init__(self, engine: str, folder: str):
        self.engine, self.folder = engine, folder
        self.name, self.parameters = parse(engine)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(
        self, function: Callable[[int], Any], calls: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """Yield (i, 0) for every i in `calls` when all are done; one call runs in this process.

        Raises what a call raises, and ValueError where SLURM's job has failed.
        """
        if len(calls) == 1:
            function(calls[0])
        elif self.name == "ray" and calls:
            _ray(function, calls, **self.parameters)
        elif calls:
            self._run_by_datatrove(function, calls)
        for i in calls:
            yield i, 0

    def _run_by_datatrove(self, function: Callable[[int], Any], calls: Sequence[int]) -> None:
        logs = f"{self.folder}/logs/{time.time_ns()}"  # with datatrove's marks of completion
        parameters = dict(self.parameters)
        if self.name == "slurm":
            path = f'export PATH={shlex.quote(os.path.dirname(sys.executable))}:"$PATH"'
            default = {"job_name": "prepare-data", "env_command": path, "qos": ""}
            parameters = default | parameters | {"sbatch_args": {"wait": ""}}
        executor = _executor(self.name)(
            [Tasks(function, calls)], tasks=len(calls), logging_dir=logs, **parameters
        )
        try:
            executor.run()
        except subprocess.CalledProcessError as error:  # of sbatch, which waits for the job
            raise ValueError(
                f"--engine={self.engine!r}: sbatch has ended with {error.returncode}, see its "
                f"message above, or the logs in {logs}"
            ) from error


def _ray(
    task: Callable[[int], object],
    numbers: Sequence[int],
    *,
    address: str = "auto",
    cpus_per_task: float = 1.0,
    memory_gb: float = 2.0,
) -> None:
    """Run tasks on a Ray cluster that is there (`ray start`); one of a dead node runs again."""
    ray: Any = importlib.import_module("ray")  # of no extra: 0.6 GB
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    run_one = ray.remote(lambda i: task(i)).options(
        num_cpus=cpus_per_task, memory=int(memory_gb * 2**30), max_retries=_ATTEMPTS
    )
    ray.get([run_one.remote(i) for i in numbers])
