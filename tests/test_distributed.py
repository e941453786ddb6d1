"""Processes find each other, refuse each other with reasons, and end when one is lost."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from environment import fake_devices

from lm.exit_codes import Exit
from lm.parallel.cluster_env import Environment, detect
from lm.parallel.process_group import differences
from lm.parallel.rendezvous import Mismatch, PeerConnections, PeerLost, connect_peers

ROOT = pathlib.Path(__file__).parent.parent

# Collectives in a loop, through the same entry as every script.
SCRIPT = """
import os, signal, sys, time
from lm import cli
from lm.parallel import process_group
from lm.exit_codes import Exit, RunError

class Full(RunError):
    code = Exit.SAVE_FAILED

def main():
    parser = cli.ArgumentParser()
    parser.add_argument("--what", default="", help="done by the last process at step 5")
    process_group.add_flags(parser)
    what = parser.parse_args().what
    env = process_group.initialize_from(parser.parse_args())
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    last = env.process_id == env.num_processes - 1
    process_group.agree("code", {"commit": "abc"})
    process_group.agree("config", {"seed": 0, "model": {"dim": 3}})
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    x = jax.make_array_from_callback((len(jax.devices()),), sharding, lambda i: np.ones(8)[i])
    step = jax.jit(lambda x: x * 0.5 + x.sum(), out_shardings=sharding)
    for i in range(20 if what in ("", "stop") else 1000):
        x = jax.block_until_ready(step(x))
        if i == 5 and last and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 5 and last and what == "full":
            raise Full("no space left")
        if i == 5 and last and what == "bug":
            raise KeyError("bug")
        if i == 5 and what == "kill lead" and env.process_id == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
    return Exit.TERMINATED if what == "stop" else 0

cli.run(main)
"""


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(
    script: pathlib.Path, process_id: int, port: int, *arguments: str, num_processes: int = 2
):
    environment = fake_devices(1)
    command = [
        *(sys.executable, str(script), f"--coordinator=localhost:{port}"),
        *(f"--num-processes={num_processes}", f"--process-id={process_id}", *arguments),
    ]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def together(tmp_path):
    """(what) -> [(exit code, stdout, stderr)] of the two processes of SCRIPT."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("ROOT", repr(str(ROOT))))

    def run(*arguments: str, ids=(0, 1)):
        port = free_port()
        processes = [start(script, i, port, *arguments) for i in ids]
        try:
            output = [process.communicate(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [(p.returncode, *texts) for p, texts in zip(processes, output, strict=True)]

    return run


# ---- detection ----


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Environment("none")),
        (
            {
                "SLURM_JOB_ID": "4097",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_STEP_NODELIST": "gpu[007-009,12],other",
                "SLURM_PROCID": "2",
            },
            Environment("SLURM", "gpu007:61441", 4, 2),
        ),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NODELIST": "a-1.cluster,a-2.cluster",
                "SLURM_PROCID": "0",
            },
            Environment("SLURM", "a-1.cluster:61447", 2, 0),
        ),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_STEP_NODELIST": "rack[1-2]node[3-4]x,rack3",
                "SLURM_PROCID": "3",
            },
            Environment("SLURM", "rack1node3x:61447", 4, 3),
        ),
        # an interactive shell in an allocation of four tasks is one task
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
            Environment("SLURM"),
        ),
        (
            {
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
                "JOB_COMPLETION_INDEX": "1",
                "JOBSET_NAME": "lm",
                "REPLICATED_JOB_NAME": "train",
                "JOB_INDEX": "2",
                "JOB_PODS": "4",
                "NUM_PROCESSES": "12",
            },
            Environment("Kubernetes JobSet", "lm-train-0-0.lm:8476", 12, 9),
        ),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, Environment("none")),  # a plain pod
        # GKE says where the TPU's hosts are, so the Job's own variables are not needed
        (
            {
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
                "JOB_COMPLETION_INDEX": "1",
                "TPU_WORKER_HOSTNAMES": "t-0.lm,t-1.lm",
                "TPU_WORKER_ID": "1",
            },
            Environment("Cloud TPU", "t-0.lm:8476", 2, 1),
        ),
        (
            {
                "TPU_WORKER_HOSTNAMES": "s1-0,s1-1",
                "TPU_WORKER_ID": "1",
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_SLICE_ID": "1",
                "MEGASCALE_COORDINATOR_ADDRESS": "s0-0:8080",
            },
            Environment("Cloud TPU", "s0-0:8476", 6, 3),
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, Environment("Cloud TPU")),
    ],
)
def test_the_launcher_is_read_from_the_environment(environ, expected):
    assert detect(environ) == expected


def slurm_task(process_id=0, **more):
    """The environment of a task of a job with two tasks on node 0 and 1, and one on node 2."""
    return {
        **{"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NODELIST": "localhost"},
        **{"SLURM_PROCID": str(process_id), "SLURM_LOCALID": str(process_id % 2)},
        **{"SLURM_NODEID": str(process_id // 2), "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"},
        **more,
    }


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (slurm_task(0, SLURM_GPUS_ON_NODE="8"), (0, 1, 2, 3)),
        (slurm_task(3, SLURM_GPUS_ON_NODE="8"), (4, 5, 6, 7)),
        (slurm_task(3, SLURM_GPUS_ON_NODE="2", CUDA_VISIBLE_DEVICES="4,6"), (1,)),
        (slurm_task(4, SLURM_GPUS_ON_NODE="8"), None),  # alone on its node
        (slurm_task(1), None),  # no GPU there
        # SLURM, or a script around this one, has given each task its own
        (slurm_task(1, SLURM_GPUS_ON_NODE="2", CUDA_VISIBLE_DEVICES="0"), None),
        (slurm_task(1, SLURM_GPUS_ON_NODE="3", JAX_PLATFORMS="cpu"), None),
    ],
)
def test_tasks_of_slurm_on_one_node_share_its_gpus(environ, expected):
    assert detect(environ).gpus == expected


def test_gpus_that_do_not_divide_among_the_tasks_of_a_node_are_refused():
    with pytest.raises(ValueError, match="the 3 GPUs of this node don't divide among its 2 tasks"):
        detect(slurm_task(1, SLURM_GPUS_ON_NODE="3"))


SHARES = """
import sys
from lm.parallel import process_group
found = process_group.initialize(peer_timeout=60)
import jax
print(found.process_id, jax.config._read("jax_cuda_visible_devices"))
sys.exit(process_group.leave(0))
"""


def test_jax_is_told_the_gpus_of_its_task():
    environment = {k: v for k, v in fake_devices(1).items() if k != "JAX_PLATFORMS"}
    # with six processes, one ended with SIGABRT each time that the service was gone before its
    # own disconnection had been answered
    job = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_NODEID": "0"}
    job["SLURM_GPUS_ON_NODE"] = "12"
    job["SLURM_JOB_ID"] = str(os.getpid())  # both take their port from it
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARES],
            env={**environment, **slurm_task(i, **job), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE, text=True,
        )
        for i in range(6)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0].splitlines()[-1:] for process in processes]
    assert [process.returncode for process in processes] == [0] * 6
    assert said == [[f"{i} {2 * i},{2 * i + 1}"] for i in range(6)]


@pytest.mark.parametrize("endpoints", ["10.0.0.2,10.0.0.3", "a:0:10.0.0.2,b:1:10.0.0.3"])
def test_a_tpu_vm_is_read_from_its_metadata(endpoints):
    metadata = {"agent-worker-number": "1", "worker-network-endpoints": endpoints}
    assert detect({}, metadata=metadata.get) == Environment("Cloud TPU", "10.0.0.2:8476", 2, 1)
    metadata["tpu-env"] = (
        "ZONE: 'x'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9'\n"
    )
    assert detect({}, metadata=metadata.get) == Environment("Cloud TPU", "10.9.9.9:8476", 4, 3)


def test_an_indexed_job_that_says_too_little_is_refused_not_run_as_many_single_ones():
    with pytest.raises(ValueError, match=r"JOBSET_NAME.*NUM_PROCESSES are not set"):
        detect({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0", "JOB_INDEX": "0"})


# ---- meeting ----


def meeting(members, *, timeout=10.0):
    """The result or error of `meet` for each (process id, number of processes it knows of)."""
    address = f"localhost:{free_port()}"
    results = [None] * len(members)

    def work(at, process_id, of):
        try:
            results[at] = connect_peers(
                address, of, process_id, timeout=timeout, serve=lambda: 1234
            )
        except (PeerLost, Mismatch) as error:
            results[at] = error

    threads = []
    for at, (process_id, of) in enumerate(members):
        threads.append(threading.Thread(target=work, args=(at, process_id, of)))
        threads[-1].start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(timeout=30)
    return results


def test_processes_meet_in_any_order_and_learn_who_goes_away():
    last, lead, second = meeting([(2, 3), (0, 3), (1, 3)])
    told = threading.Event()
    for presence in (last, lead, second):
        assert isinstance(presence, PeerConnections)
        presence.watch(told.set)
    assert lead.loss() is None
    last.announce_exit(43, "error: disk full", wait=0)
    # process 1 has no connection to process 2: process 0 tells it
    expected = "process 2 ended with exit code 43 (SAVE_FAILED): disk full"
    assert str(second.loss(wait=5)) == str(lead.loss(wait=5)) == expected
    assert lead.loss().error().code == Exit.SAVE_FAILED
    assert told.is_set()


def test_a_closed_connection_is_a_loss_and_a_good_bye_is_none():
    lead, second = meeting([(0, 2), (1, 2)])
    lead.watch(lambda: None)
    second.watch(lambda: None)
    second.announce_exit(0, "", wait=0)
    second._links[0].shutdown(socket.SHUT_RDWR)
    assert lead.loss(wait=0.3) is None
    lead, second = meeting([(0, 2), (1, 2)])
    lead.watch(lambda: None)
    second._links[0].shutdown(socket.SHUT_RDWR)
    assert "process 1 went away" in str(lead.loss(wait=5))
    assert lead.loss().error().code == Exit.PEER_LOST


def test_process_0_closes_after_all_others():
    lead, second, third = meeting([(0, 3), (1, 3), (2, 3)])
    for process in (lead, second, third):
        process.watch(lambda: None)
        process.announce_exit(0, "", wait=0)
    closing = threading.Thread(target=lead.close, kwargs={"wait": 30})
    closing.start()
    second.close(wait=30)
    closing.join(timeout=0.3)
    assert closing.is_alive()
    third.close(wait=30)
    closing.join(timeout=10)
    assert not closing.is_alive() and lead.loss() is None


def test_the_missing_process_is_named_to_those_that_came():
    results = meeting([(0, 4), (2, 4)], timeout=1.0)
    assert [type(result) for result in results] == [PeerLost, PeerLost]
    assert all("processes 1, 3 of 4 never came" in str(result) for result in results)


def test_a_process_counted_twice_or_differently_is_refused_by_all():
    for members, message in (
        ([(0, 3), (1, 3), (1, 3)], "two processes have --process-id=1"),
        ([(0, 3), (1, 3), (2, 4)], "one of 3 processes, process 2 as one of 4"),
    ):
        results = meeting(members)
        assert [type(result) for result in results] == [Mismatch] * 3
        assert all(message in str(result) for result in results)


def test_a_stranger_on_the_port_and_a_process_started_again_do_no_harm():
    port = free_port()
    results = {}

    def work(process_id):
        results[process_id] = connect_peers(
            f"localhost:{port}", 3, process_id, timeout=20, serve=lambda: 1234
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    threads[0].start()
    time.sleep(0.3)
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
    with socket.create_connection(("localhost", port)) as first_try:
        first_try.sendall(b'{"hello": 1, "of": 3}\n')
        time.sleep(0.3)
    threads.append(threading.Thread(target=work, args=(2,)))
    threads[2].start()
    time.sleep(0.3)  # with the first try, they would be three
    threads[1].start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(results) == [0, 1, 2]


def test_differences_are_named_by_path_and_process():
    first = {"seed": 0, "model": {"dim": 3, "deep": {"x": [1]}}}
    assert differences("config", {0: first, 1: first}) == []
    others = {0: first, 1: {**first, "seed": 1}, 2: {**first, "model": {"dim": 3}, "extra": None}}
    assert differences("config", others) == [
        "config.extra: process 0 has nothing, process 2 has null",
        "config.model.deep.x: process 0 has [1], process 2 has nothing",
        "config.seed: process 0 has 0, process 1 has 1",
    ]
    many = {i: {**first, "seed": i} for i in range(6)}
    assert differences("config", many) == [
        "config.seed: process 0 has 0, process 1 has 1, process 2 has 2, 3 more differ"
    ]


# ---- real processes ----


@pytest.mark.parametrize(
    ("what", "code"),
    [pytest.param("", 0, marks=pytest.mark.slow), ("stop", Exit.TERMINATED)],
)
def test_processes_that_end_together_end_with_their_own_code(together, what, code):
    results = together(f"--what={what}" if what else "--what=")
    assert [result[0] for result in results] == [code, code], results
    assert "launcher: flags; 2 processes" in results[0][1]
    assert [result[2] for result in results] == ["", ""]


@pytest.mark.parametrize(
    ("present", "message"),
    [(0, "process 1 of 2 never came"), (1, "process 0 of 2 doesn't answer at localhost")],
)
def test_a_missing_process_ends_the_others_with_one_line(together, present, message):
    began = time.monotonic()
    [(code, _, errors)] = together("--peer-timeout=1", ids=[present])
    assert code == Exit.PEER_LOST
    assert message in errors
    assert errors.count("\n") == 1
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("what", "gone", "codes"),
    [
        ("kill lead", 0, (-signal.SIGKILL, Exit.PEER_LOST)),
        ("full", 1, (Exit.SAVE_FAILED, Exit.SAVE_FAILED)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("kill", 1, (Exit.PEER_LOST, -signal.SIGKILL)),  # a run's: tests/test_launch.py
                ("bug", 1, (Exit.ERROR, Exit.ERROR)),
            )
        ),
    ],
)
def test_when_a_process_goes_away_the_other_says_so_and_ends(together, what, gone, codes):
    results = together(f"--what={what}")
    assert tuple(result[0] for result in results) == codes
    errors = results[1 - gone][2]
    assert f"error: process {gone} " in errors
    assert "Traceback" not in errors and "stack trace" not in errors
    assert ("Traceback" in results[gone][2]) == (what == "bug")
    if what == "full":
        assert "process 1 ended with exit code 43 (SAVE_FAILED): no space left" in errors
