"""Process group: the processes of one run, started together, agreeing, and ended together.

`jax.distributed` answers a process that never comes, or that dies, with SIGABRT and a page of
stack. Here the processes first connect to each other (rendezvous.py), which finds who is missing,
and stay connected, which finds who died. The others then end with one line and with the exit code
that this process announced, else with `Exit.PEER_LOST`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from lm.config.tree import leaves
from lm.exit_codes import Exit, RunError
from lm.parallel.cluster_env import Environment, detect, gce_metadata
from lm.parallel.coordination_service import HEARTBEAT, LINGER, CoordinationService
from lm.parallel.rendezvous import Mismatch, PeerConnections, PeerLost, connect_peers

# Seconds that a process has to end by itself (an error in a collective, a save, evidence being
# written) after another one is gone; then it is ended.
GRACE = 30.0
COMMUNICATION = ("gloo", "nccl", "coordination", "peer", "unavailable")  # in texts of errors

T = TypeVar("T")

_peers: PeerConnections | None = None
_service: CoordinationService | None = None  # in process 0
_peer_timeout = 300.0
_count = itertools.count()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a process that may be one of several; `initialize_from` reads them."""
    add = parser.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of process 0, if nothing else says")
    add("--num-processes", type=int, metavar="N", help="processes of the run; with --coordinator")
    add("--process-id", type=int, metavar="I", help="this one, from 0; with --coordinator")
    add("--peer-timeout", type=float, default=300.0, metavar="SECONDS", help="to wait for others")


def initialize_from(flags: argparse.Namespace) -> Environment:
    """`initialize` as the flags of `add_flags` say."""
    return initialize(
        coordinator=flags.coordinator,
        num_processes=flags.num_processes,
        process_id=flags.process_id,
        peer_timeout=flags.peer_timeout,
    )


def initialize(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    peer_timeout: float = 300.0,
) -> Environment:
    """Join the processes of the run, before anything asks JAX for its devices.

    The arguments, given together, take precedence over the environment.

    Raises:
        PeerLost: not all processes came within `peer_timeout` seconds.
        Mismatch: the processes were started with different counts.
        ValueError: the arguments or the environment are incomplete.
    """
    global _peers, _peer_timeout
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        found = detect(os.environ, metadata=gce_metadata)
    elif None in given:
        raise ValueError("give --coordinator, --num-processes and --process-id together, or none")
    else:
        found = Environment("flags", coordinator or "", num_processes or 0, process_id or 0)
    if not 0 <= found.process_id < found.num_processes:
        raise ValueError(
            f"{found.launcher}: the process id ({found.process_id}) must be from 0 to below the "
            f"number of processes ({found.num_processes})"
        )
    if found.process_id == 0:
        print(found)
    if found.num_processes == 1:
        return found
    if found.gpus is not None:
        import jax

        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, ",".join(map(str, found.gpus)))
    _peer_timeout = peer_timeout
    sys.excepthook = _report_and_leave
    _peers = _connect(found, peer_timeout)
    _peers.watch(lambda: threading.Thread(target=_end_later, daemon=True).start())
    return found


def _connect(found: Environment, timeout: float) -> PeerConnections:
    """Connect to the other processes, then do what `jax.distributed.initialize` does."""
    import jax
    from jax._src import distributed
    from jax._src.lib import _jax as runtime  # pyright: ignore[reportPrivateImportUsage]

    # its handler of SIGTERM would replace that of lm/reliability/stop_signals.py
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = max(1, round(timeout))

    def serve() -> int:
        global _service
        _service = CoordinationService(found.num_processes, seconds)
        return _service.port

    peers = connect_peers(
        found.coordinator, found.num_processes, found.process_id, timeout=timeout, serve=serve
    )
    state = distributed.global_state
    state.coordinator_address = f"{found.coordinator.rpartition(':')[0]}:{peers.service_port}"
    state.process_id, state.num_processes = found.process_id, found.num_processes
    client = state.client = runtime.get_distributed_runtime_client(
        state.coordinator_address,
        found.process_id,
        init_timeout=seconds,
        shutdown_timeout=seconds,
        heartbeat_timeout=HEARTBEAT,
        # called where the service is gone with its machine: the call fails in C++ and aborts, which
        # launchers take for a crash and restart; without one the process would end with code 1
        missed_heartbeat_callback=lambda status: None,
        shutdown_on_destruction=False,
        use_compression=True,
    )
    try:
        client.connect()
    except RuntimeError as error:
        if loss := peers.loss(wait=1.0):
            raise loss.error() from error
        raise PeerLost(f"the processes could not connect: {error}") from error
    return peers


def agree(name: str, value: Mapping[str, object]) -> None:
    """Return once all processes have called it with the same JSON value under the same name.

    Process 0 compares and the others read its result, so that thousands of processes may agree.

    Raises:
        Mismatch: in every process; names the first differences by key path.
        PeerLost: a process went away, or never came here.
    """
    if _peers is None:
        return
    from jax._src.distributed import global_state as state

    assert state.client is not None  # made by initialize
    prefix, count = f"lm/{next(_count)}/{name}", state.num_processes
    state.client.key_value_set(f"{prefix}/{state.process_id}", json.dumps(value, sort_keys=True))

    def compare() -> list[str]:
        values = {p: json.loads(_wait_for(f"{prefix}/{p}", p, name)) for p in range(count)}
        return differences(name, values)

    if lines := from_lead(name, compare):
        raise Mismatch(
            f"the processes differ in {name}; start all of them alike:\n  " + "\n  ".join(lines)
        )


def differences(name: str, values: Mapping[int, Mapping[str, object]]) -> list[str]:
    """Lines such as "config.seed: process 0 has 0, process 1 has 1", at most eight of them."""
    flat = {
        process: {f"{name}.{path}": json.dumps(leaf) for path, leaf in leaves(value)}
        for process, value in values.items()
    }
    lines = []
    for path in sorted(set().union(*flat.values())):
        found = {process: tree.get(path, "nothing") for process, tree in flat.items()}
        wrong = [process for process in found if found[process] != found[0]]
        if wrong:
            has = [f"process {process} has {found[process]}" for process in (0, *wrong[:2])]
            more = [f"{len(wrong) - 2} more differ"] if len(wrong) > 2 else []
            lines.append(f"{path}: {', '.join(has + more)}")
    return lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])


def _wait_for(key: str, process: int, name: str, stopped: Callable[[], bool] | None = None) -> str:
    """The value that `process` sets for `key`, within `_peer_timeout` or until `stopped`."""
    import jax
    from jax._src.distributed import global_state as state

    assert state.client is not None
    deadline = time.monotonic() + (_peer_timeout if stopped is None else math.inf)
    while True:
        try:
            return state.client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if _peers is not None and (loss := _peers.loss()):
                raise loss.error() from error
            if stopped is not None and stopped():
                raise PeerLost(f"process {process} had said nothing of its {name} yet") from error
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"process {process} said nothing of its {name} in {_peer_timeout:g} s"
                ) from error


def from_lead(name: str, make: Callable[[], T]) -> T:
    """The JSON value of `make` in process 0, in every process; all call it together. PeerLost where
    process 0 died, such as by an error in `make`.

    For decisions that each process would otherwise make by its own view of a file system.
    """
    return from_process(0, name, make)


def from_process(process: int, name: str, make: Callable[[], T]) -> T:
    """As `from_lead`, of another process."""
    from jax._src.distributed import global_state as state

    if state.client is None:  # one process
        return json.loads(json.dumps(make()))
    key = f"lm/{next(_count)}/{name}"
    if state.process_id == process:
        state.client.key_value_set(key, json.dumps(make()))
    return json.loads(_wait_for(key, process, name))


def background_key(name: str) -> str:
    """A key for `reduce_on_lead`; all processes call it together, in their main threads."""
    return f"lm/{next(_count)}/{name}"


def reduce_on_lead(
    key: str, text: str, reduce: Callable[[Iterator[str]], str], *, stopped: Callable[[], bool]
) -> str:
    """The result of `reduce`, which process 0 calls with the texts of all processes, in every
    process. For threads in the background, which may neither join collectives nor hold them up.

    reduce: takes the texts one at a time. stopped: called every second; True ends the waiting.

    Raises:
        PeerLost: a process died, or the waiting was stopped.
    """
    from jax._src.distributed import global_state as state

    client, name = state.client, key.rpartition("/")[2]
    if client is None:  # one process
        return reduce(iter([text]))
    if state.process_id:
        client.key_value_set(f"{key}/{state.process_id}", text)
        return _wait_for(f"{key}/result", 0, name, stopped)

    def texts() -> Iterator[str]:
        yield text
        for process in range(1, state.num_processes):
            yield _wait_for(f"{key}/{process}", process, name, stopped)
            client.key_value_delete(f"{key}/{process}")

    result = reduce(texts())
    client.key_value_set(f"{key}/result", result)
    return result


def print_on_lead(text: str) -> None:
    """Print `text` in process 0 only."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """A context that raises `PeerLost` for errors that a lost process causes.

    Collectives fail with errors of any class and text. An error counts as caused by a lost process
    if that died silently, or announced its exit and the error's text is about communication.
    """
    try:
        yield
    except (RuntimeError, ValueError, RunError) as error:
        if _peers is None or isinstance(error, PeerLost):
            raise
        text = str(error).lower()
        is_communication = not isinstance(error, RunError) and any(w in text for w in COMMUNICATION)
        loss = _peers.loss(wait=2.0 if is_communication else 0.0)
        if loss and (is_communication or loss.code is None):
            raise loss.error() from error
        if "gloo" in text:
            raise PeerLost(f"a connection to another process failed: {error}") from error
        raise


def leave(code: int, message: str = "") -> int:
    """Leave the group, as the last call of this process; return its exit code.

    Without a message all processes have come to the end, and they wait for each other. With one
    this process ends at once, and the others receive the message.
    """
    if _peers is None:
        return code
    if not message:
        import jax

        _peers.announce_exit(code, "", wait=0.0)
        try:
            jax.distributed.shutdown()
            # a client that still hears of its own shutdown would be aborted by the service's
            _peers.close(wait=LINGER)
            if _service is not None:
                _service.shutdown()
            return code
        except RuntimeError as error:
            loss = _peers.loss(wait=1.0)
            code = loss.error().code if loss else Exit.PEER_LOST
            print(f"error: {loss or error}", file=sys.stderr)
    else:
        _peers.announce_exit(code, message[:2000], wait=1.0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # JAX's own end waits for those that don't come


def _report_and_leave(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Replacement of sys.excepthook that tells the other processes."""
    sys.__excepthook__(kind, error, trace)
    leave(Exit.ERROR, f"{kind.__name__}: {error}")


def _end_later() -> None:
    """End this process if its main thread does not end within GRACE seconds of a loss."""
    time.sleep(GRACE)
    assert _peers is not None
    loss = _peers.loss()
    assert loss is not None, "called after a loss"
    error = loss.error()
    print(f"error: {error} (ended {GRACE:g} s later)", file=sys.stderr, flush=True)
    os._exit(error.code)
